// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"slices"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/listening"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/workload"
)

// Consul checks who may register a name. What else a registration says is its
// author's: the ID that names an allocation, the address, the ports, the
// metadata. It counts for an allocation only where this node shows that the
// allocation runs that proxy.

// identify keeps of the subjects' registrations those that count.
func (a *Agent) identify(allocations []desired.Allocation, known catalog.Data, now time.Time) {
	var due []*desired.Allocation
	var namespaces []string
	a.unproven = time.Time{}
	var foreign []health.Problem
	for i := range allocations {
		s := &allocations[i]
		m := &a.stateOf(s.Key, now).identity
		m.Remember(s.Proxies, now)
		if len(s.Proxies) > 0 && m.Due(now) {
			due = append(due, s)
			if s.NetNS != "" {
				namespaces = append(namespaces, s.NetNS)
			}
		}
	}
	cgroups := identity.CgroupsIn(namespaces)
	containers := a.containers()
	for _, s := range due {
		a.allocations[s.Key].identity.Look(*s, cgroups, containers, now)
	}
	for i := range allocations {
		s := &allocations[i]
		if len(s.Proxies) == 0 {
			continue
		}
		m := &a.allocations[s.Key].identity
		foreign = append(foreign, m.Judge(s, known, a.config.Proxy.DefaultUID, now)...)
		if next, doubtful := m.Next(); doubtful && (a.unproven.IsZero() || next.Before(a.unproven)) {
			a.unproven = next
		}
	}
	a.tellForeign(foreign)
}

// stateOf is what the loop remembers of an attachment, from now on where it is new.
func (a *Agent) stateOf(key workload.AttachmentID, now time.Time) *allocState {
	m := a.allocations[key]
	if m == nil {
		m = &allocState{born: now, view: api.WorkloadView{Since: now}}
		a.allocations[key] = m
	}
	return m
}

// tellForeign shows the registrations that do not count, and logs each once.
func (a *Agent) tellForeign(problems []health.Problem) {
	a.mu.Lock()
	before := a.foreign
	a.foreign = problems
	a.mu.Unlock()
	for _, problem := range problems {
		if !slices.Contains(before, problem) {
			a.log.Warn("registration in Consul does not count", "alloc_id", problem.AllocID, "why", problem.Text())
		}
	}
}

// untilProven is how long nobody looks whether allocations run the proxies that
// are registered for them. It asks for a pass where that is due.
func (a *Agent) untilProven(now time.Time) time.Duration {
	if a.unproven.IsZero() {
		return tick
	}
	if !now.Before(a.unproven) {
		a.trigger()
	}
	return max(a.unproven.Sub(now), listening.FirstSearch)
}
