// SPDX-License-Identifier: MPL-2.0

package discover

import (
	"strings"

	"github.com/weirmesh/weir/agent/registration"
)

// TaskOf names the task of the allocation that a cgroup belongs to: by the
// allocation's scope, as the drivers with cgroups of Nomad's have it, or by the
// container. The first part of the path that is one or the other decides: what
// lies below is made by whoever runs in it, under any name.
func TaskOf(cgroup, alloc string, known Containers) string {
	for part := range strings.SplitSeq(cgroup, "/") {
		if of, task, found := ScopeOf(part); found {
			if of != alloc {
				return ""
			}
			return task
		}
		container := ContainerOf(part)
		if of, found := known.Allocs[container]; found {
			if of != alloc {
				return ""
			}
			return known.Tasks[container]
		}
	}
	return ""
}

// ScopeOf takes the name of a cgroup apart that Nomad makes for a task.
func ScopeOf(part string) (alloc, task string, found bool) {
	const length = 36
	part = strings.TrimSuffix(part, ".scope")
	if len(part) < length+2 || part[length] != '.' || !registration.IsAllocID(part[:length]) {
		return "", "", false
	}
	return part[:length], part[length+1:], true
}
