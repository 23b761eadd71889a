// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"github.com/weirmesh/weir/redirect"
)

// gather joins what libcni, the records, the makers of namespaces and Consul
// know, sorted by key.
func gather(cached map[redirect.Key]attachment, known []redirect.Known, spaces namespaces, consul view) []subject {
	subjects := make(map[redirect.Key]*subject)
	for key, found := range cached {
		subjects[key] = &subject{attachment: found, Cached: true}
	}
	for i, k := range known {
		s := subjects[k.Key]
		if s == nil {
			s = &subject{attachment: attachment{
				Key: k.Key, Network: k.Request.Network, NetNS: k.NetNS, Job: k.Request.Job, Addresses: k.Request.Addresses,
			}}
			subjects[k.Key] = s
		}
		s.Known = &known[i]
	}
	allocations := make(map[string]bool)
	for _, s := range subjects {
		allocations[s.Job.AllocID] = true
		s.NetNS, s.Live = spaces.of(s.Job.AllocID, s.NetNS)
	}
	for _, found := range spaces.others(allocations) {
		if len(consul.of(found)) > 0 { // else nothing says that it is in the mesh
			subjects[found.Key] = &subject{attachment: found, Live: true}
		}
	}
	list := make([]subject, 0, len(subjects))
	for _, key := range slices.SortedFunc(maps.Keys(subjects), compareKeys) {
		s := subjects[key]
		s.Proxies = consul.of(s.attachment)
		list = append(list, *s)
	}
	return list
}

func compareKeys(a, b redirect.Key) int {
	return cmp.Or(strings.Compare(a.ContainerID, b.ContainerID), strings.Compare(a.IfName, b.IfName))
}
