// SPDX-License-Identifier: MPL-2.0

package view

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/workload"
)

// seen is what is remembered of a registration without a namespace.
type seen struct {
	state  api.State
	since  time.Time // of state
	onNode bool      // its proxy was seen in the node's own network
	looked time.Time // for its proxy
}

// again is how long until a gateway is looked for on the node once more.
const again = 30 * time.Second

// Unmatched remembers registrations without a namespace, by allocation or proxy ID.
type Unmatched map[string]seen

// Lines are the proxies of this node that belong to no namespace here: a line
// for each allocation, and for each proxy that is no allocation's.
func (u Unmatched) Lines(allocations []desired.Allocation, consul catalog.Snapshot, known discover.Containers, now time.Time) (lines []api.WorkloadView) {
	found, claimed := make(map[string]bool), make(map[string]bool)
	for _, s := range allocations {
		found[s.Job.AllocID] = true
		for _, p := range s.Proxies {
			claimed[p.ID] = true
		}
	}
	lists := make(map[string][]registration.Proxy) // by what the line is for
	for id, list := range consul.Proxies {
		if id != "" && !found[id] {
			lists[id] = list
		}
	}
	for _, p := range consul.Proxies[""] {
		if !claimed[p.ID] {
			lists[p.ID] = []registration.Proxy{p}
		}
	}
	maps.DeleteFunc(u, func(id string, _ seen) bool { return lists[id] == nil })
	for _, id := range slices.Sorted(maps.Keys(lists)) {
		before := u[id]
		next := before
		if !next.onNode && mayBeOnNode(lists[id]) && now.Sub(next.looked) > again {
			next.looked, next.onNode = now, seenOnNode(id, lists[id], known)
		}
		var problems []health.Problem
		next.state, problems = judgeUnmatched(lists[id], next.onNode)
		if next.state != before.state {
			next.since = now
		}
		u[id] = next
		s := desired.Allocation{Attachment: discover.Attachment{Key: workload.AttachmentID{ContainerID: id}, Job: workload.Job{AllocID: id}}, Proxies: lists[id]}
		line := Of(s, next.state, desired.Plan{}, problems, consul.Facts)
		line.Since = next.since
		lines = append(lines, line)
	}
	return lines
}

// judgeUnmatched says what to make of the proxies of one allocation, or of one that
// is no allocation's. onNode says that they were seen in the node's own network.
func judgeUnmatched(proxies []registration.Proxy, onNode bool) (api.State, []health.Problem) {
	switch {
	case proxies[0].AllocID == "":
		return api.StateUnclaimed, []health.Problem{health.NewProblem(health.ProblemUnclaimedProxy,
			"nothing where it runs outside of Nomad; a gateway that registers itself is found by -address, or by its job's name",
			"no allocation of this node is known to run it: its ID names none, and neither an address nor a job with a mapped port is its own; where it runs in an allocation, nothing guards it there")}
	case onNode && mayBeOnNode(proxies) || !slices.ContainsFunc(proxies, func(p registration.Proxy) bool { return !p.BindsAsNode }):
		return api.StateHost, nil
	}
	return api.StateUnprotected, []health.Problem{health.NewProblem(health.ProblemUnprotected,
		"where it runs, set cni { cache_dir, netns_dir } to where Nomad's client has them; where it has ended, 'consul services deregister' what is left of it",
		"no network namespace of it is known on this node")}
}

// mayBeOnNode reports proxies of which their registration does not tell that
// they are in the node's own network. Nomad lets gateways be there, and no others.
func mayBeOnNode(proxies []registration.Proxy) bool {
	gateway := !slices.ContainsFunc(proxies, func(p registration.Proxy) bool { return !p.IsGateway() })
	return gateway && proxies[0].AllocID != "" && slices.ContainsFunc(proxies, func(p registration.Proxy) bool { return !p.BindsAsNode })
}

// seenOnNode reports whether the task that Nomad injected for a gateway of the
// allocation runs in the node's own network. It walks all processes of the node.
func seenOnNode(alloc string, proxies []registration.Proxy, known discover.Containers) bool {
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return false
	}
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return false
	}
	return slices.ContainsFunc(processes, func(process string) bool {
		if netns, err := os.Readlink(filepath.Join(process, "ns/net")); err != nil || netns != own {
			return false
		}
		data, err := os.ReadFile(filepath.Join(process, "cgroup"))
		if err != nil {
			return false // it ended
		}
		for line := range strings.Lines(string(data)) {
			cgroup := strings.TrimSpace(line)
			container := discover.ContainerOf(cgroup)
			if task := discover.TaskOf(cgroup, alloc, known); (container == "" || known.Allocs[container] == alloc) && registration.Injected(task, proxies) {
				return true
			}
		}
		return false
	})
}
