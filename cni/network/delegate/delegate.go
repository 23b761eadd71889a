// SPDX-License-Identifier: MPL-2.0

// Package delegate asks other plugins: the IPAM plugin, of which host-local is linked
// in, and portmap for what an earlier version had mapped by it.
package delegate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/redirect/workload"

	current "github.com/containernetworking/cni/pkg/types/100"
)

// HostLocal is the IPAM plugin that a network has unless its conflist names
// another. It is the only one that is not run but linked in.
const HostLocal = "host-local"

// Need reports what of the programs that the network runs is not on the node.
func Need(c *attachment.Config, path string) error {
	var plugins []string
	if c.IPAM != HostLocal {
		plugins = append(plugins, c.IPAM)
	}
	for _, plugin := range plugins {
		if _, err := Find(plugin, path); err != nil {
			return err
		}
	}
	return nil
}

// plainArgs is CNI_ARGS as other plugins can read it: CNI's parser refuses a
// value that holds another '='. Consul's config is not theirs to read.
func plainArgs(text string) string {
	kept := []string{"IgnoreUnknown=true"}
	for pair := range strings.SplitSeq(text, ";") {
		key, _, _ := strings.Cut(pair, "=")
		if strings.Count(pair, "=") == 1 && key != "IgnoreUnknown" && !strings.HasPrefix(key, "CONSUL_") {
			kept = append(kept, pair)
		}
	}
	return strings.Join(kept, ";")
}

// Lease takes addresses. A lease that the key still has, from before a reboot
// or a crash, is given back first.
func Lease(ctx context.Context, r *attachment.Record) (*current.Result, error) {
	leased, err := Call(ctx, r, "ADD", r.IPAM, r.Delegate)
	if err != nil && !errors.Is(err, attachment.ErrMissing) {
		if release := Release(ctx, r); release == nil {
			var again error
			if leased, again = Call(ctx, r, "ADD", r.IPAM, r.Delegate); again == nil {
				err = nil
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("take an address: %w", err)
	}
	result, err := current.NewResultFromResult(leased)
	if err != nil {
		return nil, fmt.Errorf("take an address: result of %s: %w", r.IPAM, err)
	}
	if len(result.IPs) == 0 {
		return nil, fmt.Errorf("take an address: %s gave none", r.IPAM)
	}
	return result, nil
}

func Release(ctx context.Context, r *attachment.Record) error {
	if _, err := Call(ctx, r, "DEL", r.IPAM, r.Delegate); err != nil {
		return fmt.Errorf("give the address back: %w", err)
	}
	return nil
}

// CheckLease takes a lost lease anew: with the address free, the next ADD
// would give it to another.
func CheckLease(ctx context.Context, r *attachment.Record) (repairs []string, err error) {
	if _, err := Call(ctx, r, "CHECK", r.IPAM, r.Delegate); err == nil || !attachment.AtLeast(r.CNIVersion, "0.4.0") {
		return nil, nil
	}
	stdin, err := withAddresses(r.Delegate, r.Result)
	if err != nil {
		return nil, err
	}
	if _, err := Call(ctx, r, "ADD", r.IPAM, stdin); err != nil {
		return []string{fmt.Sprintf("the lease is lost and cannot be had again, the allocation keeps its address: %v", err)}, nil
	}
	return []string{"lease of " + r.Result.IPs[0].Address.IP.String()}, nil
}

// withAddresses asks in a configuration for the addresses of a result, as
// host-local understands it.
func withAddresses(stdin json.RawMessage, result *current.Result) ([]byte, error) {
	var conf map[string]any
	if err := json.Unmarshal(stdin, &conf); err != nil {
		return nil, err
	}
	var ips []string
	for _, ip := range result.IPs {
		ips = append(ips, ip.Address.IP.String())
	}
	conf["args"] = map[string]any{"cni": map[string]any{"ips": ips}}
	return json.Marshal(conf)
}

// CollectLeases gives back the leases of host-local that belong to no valid
// attachment: those whose record was lost.
func CollectLeases(ctx context.Context, config attachment.Config, valid []workload.AttachmentID, path string) error {
	if config.IPAM != HostLocal || config.LeaseDir == "" {
		return nil
	}
	dir := filepath.Join(config.LeaseDir, config.Name)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list leases: %w", err)
	}
	var problems []error
	for _, entry := range entries {
		data, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		owner, ifName, ok := strings.Cut(strings.ReplaceAll(strings.TrimSpace(string(data)), "\r", ""), "\n")
		key := workload.AttachmentID{ContainerID: owner, IfName: ifName}
		if err != nil || !ok || slices.Contains(valid, key) {
			continue // the lock, the last address, or gone by now
		}
		r := &attachment.Record{Config: config, Attachment: attachment.Attachment{Key: key, Path: path}}
		problems = append(problems, Release(ctx, r))
	}
	return errors.Join(problems...)
}
