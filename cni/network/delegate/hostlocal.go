// SPDX-License-Identifier: MPL-2.0

package delegate

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/weirmesh/weir/cni/network/attachment"

	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/plugins/plugins/ipam/host-local/backend/disk"
	"github.com/weirmesh/weir/cni/network/leases"
)

// This file is the reference plugin host-local without its process, which took a
// sixth of an ADD: its files, its lock, its order of addresses. Whether it or this took
// a lease cannot be told, and each gives back what the other took.

// withLeases opens the leases of a configuration, under the lock of host-local.
func withLeases(r *attachment.Record, stdin []byte, action func(*leases.Config, *disk.Store) error) (err error) {
	conf, err := leases.Parse(stdin, plainArgs(r.Args))
	if err != nil {
		return err
	}
	files, err := disk.New(conf.Name, conf.DataDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, files.Close()) }()
	return action(conf, files)
}

// take takes an address of each set of ranges, or none at all. Where the record of a
// fresh key was lost, a lease of it stays beside the new one until DEL, which reads all.
func take(r *attachment.Record, stdin []byte) (types.Result, error) {
	result := &current.Result{CNIVersion: current.ImplementedSpecVersion}
	err := withLeases(r, stdin, func(conf *leases.Config, files *disk.Store) (err error) {
		if conf.ResolvConf != "" {
			if result.DNS, err = readResolvConf(conf.ResolvConf); err != nil {
				return err
			}
		}
		asked := conf.Asked
		for i, set := range conf.Sets {
			var wanted netip.Addr
			wanted, asked = claim(asked, set)
			ip, err := conf.Take(files, i, r.Key.ContainerID, r.Key.IfName, wanted, r.Fresh)
			if err != nil {
				if errors.Is(err, leases.ErrFull) {
					err = fmt.Errorf("%w: %s has each lease as a file: take a larger subnet, or remove what no allocation holds", err, filepath.Join(r.LeaseDir, conf.Name))
				}
				err = fmt.Errorf("range %d: %w", i, err)
				if i > 0 {
					err = errors.Join(err, leases.Free(files, r.Key.ContainerID, r.Key.IfName))
				}
				return err
			}
			result.IPs = append(result.IPs, ip)
		}
		if len(asked) > 0 {
			return errors.Join(fmt.Errorf("address %s was asked for and is in no range", asked[0]), leases.Free(files, r.Key.ContainerID, r.Key.IfName))
		}
		result.Routes = conf.Routes
		return nil
	})
	return result, err
}

// claim takes the address out of asked that lies in the set, and returns the others; it
// is not valid where none does.
func claim(asked []netip.Addr, set leases.Set) (wanted netip.Addr, others []netip.Addr) {
	at := slices.IndexFunc(asked, set.Contains)
	if at < 0 {
		return wanted, asked
	}
	wanted = asked[at]
	return wanted, slices.DeleteFunc(slices.Clone(asked), func(addr netip.Addr) bool { return addr == wanted })
}

func readResolvConf(path string) (dns types.DNS, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return dns, err
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "nameserver":
			dns.Nameservers = append(dns.Nameservers, fields[1])
		case "domain":
			dns.Domain = fields[1]
		case "search":
			dns.Search = append(dns.Search, fields[1:]...)
		case "options":
			dns.Options = append(dns.Options, fields[1:]...)
		}
	}
	return dns, nil
}

// hostLocal does what host-local does at a command.
func hostLocal(r *attachment.Record, command string, stdin []byte) (result types.Result, err error) {
	switch command {
	case "ADD":
		result, err = take(r, stdin)
	case "DEL":
		err = withLeases(r, stdin, func(_ *leases.Config, files *disk.Store) error {
			return leases.Free(files, r.Key.ContainerID, r.Key.IfName)
		})
	case "CHECK":
		err = withLeases(r, stdin, func(_ *leases.Config, files *disk.Store) error {
			if !files.FindByID(r.Key.ContainerID, r.Key.IfName) {
				return errors.New("no lease")
			}
			return nil
		})
	}
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", HostLocal, command, err)
	}
	return result, nil
}
