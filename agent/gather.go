// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/workload"
)

// gather joins what libcni, the records, the makers of namespaces and Consul
// know, sorted by key.
func gather(cached map[workload.AttachmentID]attachment, known []redirect.Record, spaces namespaces, consul snapshot) []allocation {
	allocations := make(map[workload.AttachmentID]*allocation)
	for key, found := range cached {
		allocations[key] = &allocation{attachment: found, Cached: true}
	}
	for i, k := range known {
		s := allocations[k.Key]
		if s == nil {
			s = &allocation{attachment: attachment{
				Key: k.Key, Network: k.Request.Network, NetNS: k.NetNS, Job: k.Request.Job, Addresses: k.Request.Addresses,
			}}
			allocations[k.Key] = s
		}
		s.Record = &known[i]
	}
	allocIDs := make(map[string]bool)
	for _, s := range allocations {
		allocIDs[s.Job.AllocID] = true
		s.NetNS, s.Live = spaces.of(s.Job.AllocID, s.NetNS)
	}
	for _, found := range spaces.others(allocIDs) {
		if len(proxiesOf(consul, found)) > 0 { // else nothing says that it is in the mesh
			allocations[found.Key] = &allocation{attachment: found, Live: true}
		}
	}
	list := make([]allocation, 0, len(allocations))
	for _, key := range slices.SortedFunc(maps.Keys(allocations), compareKeys) {
		s := allocations[key]
		s.Proxies = proxiesOf(consul, s.attachment)
		list = append(list, *s)
	}
	return list
}

func compareKeys(a, b workload.AttachmentID) int {
	return cmp.Or(strings.Compare(a.ContainerID, b.ContainerID), strings.Compare(a.IfName, b.IfName))
}

// of returns the proxies of an allocation: those whose ID names it, and of the
// others those that are registered under one of its addresses or, gateways that
// register themselves without an address, as what its job is for.
func proxiesOf(v snapshot, a attachment) []proxy {
	list := slices.Clone(v.Proxies[a.Job.AllocID])
	if a.Job.AllocID == "" {
		list = nil
	}
	for _, p := range v.Proxies[""] {
		if p.Address.IsValid() && slices.Contains(a.Addresses, p.Address.Unmap()) || runsGateway(v.Facts, a, p) {
			list = append(list, p)
		}
	}
	return list
}

// runs reports whether an allocation runs the gateway that "consul connect
// envoy -gateway -register" registered for it: without -address, as jobs for API
// gateways have it, nothing tells but that it has the job's name and that the job
// maps a port of its listeners. Neither alone is enough.
func runsGateway(f catalogData, a attachment, p proxy) bool {
	if !p.isGateway() || p.AllocID != "" || a.Job.ID == "" || a.Job.ID != p.Self.Name {
		return false
	}
	if p.Address.IsValid() && !slices.Contains(a.Addresses, p.Address.Unmap()) {
		return false
	}
	listeners := listenersOf(p, f)
	return slices.ContainsFunc(a.mappedPorts(), func(port uint16) bool { return slices.Contains(listeners, port) })
}
