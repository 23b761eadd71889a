// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"slices"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/host"
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
		m := a.stateOf(s.Key, now)
		m.remember(s.Proxies, now)
		if len(s.Proxies) > 0 && m.doubtful(now) {
			due = append(due, s)
			if s.NetNS != "" {
				namespaces = append(namespaces, s.NetNS)
			}
		}
	}
	cgroups := a.cgroupsIn(namespaces)
	containers := a.containers()
	for _, s := range due {
		m := a.allocations[s.Key]
		m.taskNames = tasksOf(cgroups[s.NetNS], s.Job.AllocID, containers)
		if len(m.taskNames) > 0 && m.running.IsZero() {
			m.running = now
		}
		m.listens = nil
	}
	for i := range allocations {
		s := &allocations[i]
		if len(s.Proxies) > 0 {
			foreign = append(foreign, a.identifyOne(s, known, now)...)
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

// tasksOf are the names of an allocation's tasks, by their cgroups.
func tasksOf(cgroups []string, allocID string, containers discover.Containers) (names []string) {
	for _, path := range cgroups {
		if task := discover.TaskOf(path, allocID, containers); task != "" && !slices.Contains(names, task) {
			names = append(names, task)
		}
	}
	return names
}

// identifyOne judges the registrations of one allocation and remembers how.
func (a *Agent) identifyOne(s *desired.Allocation, known catalog.Data, now time.Time) (foreign []health.Problem) {
	m := a.allocations[s.Key]
	listens := func() []uint16 {
		if m.listens == nil { // a namespace that cannot be asked shows nothing
			ports, _ := host.ListeningAs(s.NetNS, s.ProxyUID(a.config.Proxy.DefaultUID))
			m.listens = append([]uint16{}, ports...)
		}
		return m.listens
	}
	e := identity.Evidence{Tasks: m.taskNames, Listens: listens, Claims: m.claims, Settled: !m.running.IsZero() && now.Sub(m.running) > api.SettleTime}
	counted, others := e.Judge(*s, known)
	for _, p := range s.Proxies {
		c := m.claims[p.ID]
		why, refused := others[p.ID]
		s.Withdrawn = s.Withdrawn || refused && c.Counted
		if c.Counted = !refused; refused && now.Sub(c.Since) > api.SettleTime {
			foreign = append(foreign, why)
		}
		c.Shown = c.Shown || slices.ContainsFunc(m.taskNames, func(task string) bool { return registration.Injected(task, []registration.Proxy{p}) })
		m.claims[p.ID] = c
	}
	s.Withdrawn = s.Withdrawn && len(counted) == 0
	s.Proxies = counted
	if next := m.lookAgain; m.doubts() && (a.unproven.IsZero() || next.Before(a.unproven)) {
		a.unproven = next
	}
	return foreign
}

// cgroupsIn is redirect.CgroupsIn for those that can be looked at.
func (a *Agent) cgroupsIn(namespaces []string) map[string][]string {
	if len(namespaces) == 0 {
		return nil
	}
	found, err := host.CgroupsIn(namespaces...)
	if err == nil {
		return found
	}
	found = make(map[string][]string)
	for _, path := range namespaces {
		if one, err := host.CgroupsIn(path); err == nil {
			found[path] = one[path]
		}
	}
	return found
}

// remember keeps the claims of the registrations that there are.
func (m *allocState) remember(proxies []registration.Proxy, now time.Time) {
	next := make(map[string]identity.Claim, len(proxies))
	for _, p := range proxies {
		c, seen := m.claims[p.ID]
		if !seen {
			c.Since, m.lookAgain, m.looks = now, time.Time{}, 0
		}
		next[p.ID] = c
	}
	m.claims = next
}

// doubts reports whether the task of some registration was not seen yet.
func (m *allocState) doubts() bool {
	for _, c := range m.claims {
		if !c.Shown {
			return true
		}
	}
	return false
}

// doubtful reports whether it is time to look at the allocation's tasks, at first
// often, then ever more seldom.
func (m *allocState) doubtful(now time.Time) bool {
	const first, soon, last = 200 * time.Millisecond, 5 * time.Second, 5 * time.Minute
	if !m.doubts() || now.Before(m.lookAgain) {
		return false
	}
	longest := last
	for _, c := range m.claims {
		if !c.Counted {
			longest = soon // its task may come at any time
		}
	}
	m.lookAgain = now.Add(min(first<<min(m.looks, 12), longest))
	m.looks++
	return true
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
	return max(a.unproven.Sub(now), firstSearch)
}
