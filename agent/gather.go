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
		if len(consul.of(found)) > 0 { // else nothing says that it is in the mesh
			allocations[found.Key] = &allocation{attachment: found, Live: true}
		}
	}
	list := make([]allocation, 0, len(allocations))
	for _, key := range slices.SortedFunc(maps.Keys(allocations), compareKeys) {
		s := allocations[key]
		s.Proxies = consul.of(s.attachment)
		list = append(list, *s)
	}
	return list
}

func compareKeys(a, b workload.AttachmentID) int {
	return cmp.Or(strings.Compare(a.ContainerID, b.ContainerID), strings.Compare(a.IfName, b.IfName))
}
