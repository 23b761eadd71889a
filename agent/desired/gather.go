// SPDX-License-Identifier: MPL-2.0

package desired

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// Gather joins what libcni, the records, the makers of namespaces and Consul
// know, sorted by key.
func Gather(cached map[workload.AttachmentID]discover.Attachment, known []inspect.Record, spaces discover.Namespaces, consul catalog.Snapshot) []Allocation {
	allocations := make(map[workload.AttachmentID]*Allocation)
	for key, found := range cached {
		allocations[key] = &Allocation{Attachment: found, Cached: true}
	}
	for i, k := range known {
		s := allocations[k.Key]
		if s == nil {
			s = &Allocation{Attachment: discover.Attachment{
				Key: k.Key, Network: k.Request.Network, NetNS: k.NetNS, Job: k.Request.Job, Addresses: k.Request.Addresses,
			}}
			allocations[k.Key] = s
		}
		s.Record = &known[i]
	}
	allocIDs := make(map[string]bool)
	for _, s := range allocations {
		allocIDs[s.Job.AllocID] = true
		s.NetNS, s.Live = spaces.Of(s.Job.AllocID, s.NetNS)
	}
	for _, found := range spaces.Others(allocIDs) {
		if len(ProxiesOf(consul, found)) > 0 { // else nothing says that it is in the mesh
			allocations[found.Key] = &Allocation{Attachment: found, Live: true}
		}
	}
	list := make([]Allocation, 0, len(allocations))
	for _, key := range slices.SortedFunc(maps.Keys(allocations), CompareKeys) {
		s := allocations[key]
		s.Proxies = ProxiesOf(consul, s.Attachment)
		list = append(list, *s)
	}
	return list
}

func CompareKeys(a, b workload.AttachmentID) int {
	return cmp.Or(strings.Compare(a.ContainerID, b.ContainerID), strings.Compare(a.IfName, b.IfName))
}

// ProxiesOf returns the proxies of an allocation: those whose ID names it, and of the
// others those that are registered under one of its addresses or, gateways that
// register themselves without an address, as what its job is for.
func ProxiesOf(v catalog.Snapshot, a discover.Attachment) []registration.Proxy {
	list := slices.Clone(v.Proxies[a.Job.AllocID])
	if a.Job.AllocID == "" {
		list = nil
	}
	for _, p := range v.Proxies[""] {
		if p.Address.IsValid() && slices.Contains(a.Addresses, p.Address.Unmap()) || RunsGateway(v.Facts, a, p) {
			list = append(list, p)
		}
	}
	return list
}

// RunsGateway reports whether an allocation runs the gateway that "consul connect
// envoy -gateway -register" registered for it: without -address, as jobs for API
// gateways have it, nothing tells but that it has the job's name and that the job
// maps a port of its listeners. Neither alone is enough.
func RunsGateway(f catalog.Data, a discover.Attachment, p registration.Proxy) bool {
	if !p.IsGateway() || p.AllocID != "" || a.Job.ID == "" || a.Job.ID != p.Self.Name {
		return false
	}
	if p.Address.IsValid() && !slices.Contains(a.Addresses, p.Address.Unmap()) {
		return false
	}
	listeners := catalog.ListenersOf(p, f)
	return slices.ContainsFunc(a.MappedPorts(), func(port uint16) bool { return slices.Contains(listeners, port) })
}
