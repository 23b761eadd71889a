// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"

	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
	"github.com/weirmesh/weir/cni/request"
)

// result is what the plugin before this one returned.
type result struct {
	raw     json.RawMessage
	parsed  *current.Result
	version string // of raw; "" where it does not say
	want    string // the version to print
}

// parseResult reads a previous result of any version that CNI has. One that
// names no version has the configuration's.
func parseResult(raw json.RawMessage, confVersion string) (*result, error) {
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(raw, &keys); err != nil {
		return nil, err
	}
	r := &result{raw: raw, want: confVersion}
	if version, ok := keys["cniVersion"]; ok {
		if err := json.Unmarshal(version, &r.version); err != nil {
			return nil, fmt.Errorf("cniVersion: %w", err)
		}
	}
	version := r.version
	if version == "" {
		version = confVersion
		keys["cniVersion"] = json.RawMessage(fmt.Sprintf("%q", version))
		patched, err := json.Marshal(keys)
		if err != nil {
			return nil, err
		}
		raw = patched
	}
	typed, err := create.Create(version, raw)
	if err != nil {
		return nil, err
	}
	r.parsed, err = current.NewResultFromResult(typed)
	return r, err
}

// ownResult is the result of a network that the plugin built itself.
func ownResult(built *current.Result, confVersion string) *result {
	return &result{parsed: built, want: confVersion}
}

// print writes the result in the configuration's version. Where that is the
// result's own, it goes out byte for byte, with every key that this library
// does not know.
func (r *result) print(w io.Writer) error {
	if r.raw != nil && r.version == r.want {
		_, err := fmt.Fprintf(w, "%s\n", r.raw)
		return err
	}
	converted, err := r.parsed.GetAsVersion(r.want)
	if err != nil {
		return err
	}
	return converted.PrintTo(w)
}

// addresses lists the workload's own: those on an interface inside the
// namespace, and those that name no interface. Loopback is every namespace's.
func (r *result) addresses() ([]netip.Addr, error) {
	var list []netip.Addr
	for i, ip := range r.parsed.IPs {
		if ip == nil {
			return nil, fmt.Errorf("ips[%d]: null", i)
		}
		if ip.Interface != nil {
			index := *ip.Interface
			if index < 0 || index >= len(r.parsed.Interfaces) {
				return nil, fmt.Errorf("ips[%d]: interface %d: there are %d", i, index, len(r.parsed.Interfaces))
			}
			if iface := r.parsed.Interfaces[index]; iface == nil || iface.Sandbox == "" {
				continue
			}
		}
		addr, ok := netip.AddrFromSlice(ip.Address.IP)
		addr = addr.Unmap()
		if !ok || addr.IsUnspecified() || addr.IsMulticast() {
			return nil, fmt.Errorf("ips[%d]: address %s: not an address of a workload", i, request.Quote(ip.Address.String()))
		}
		if !addr.IsLoopback() {
			list = append(list, addr)
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("ips: none in the namespace")
	}
	return list, nil
}
