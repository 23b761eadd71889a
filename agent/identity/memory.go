// SPDX-License-Identifier: MPL-2.0

package identity

import (
	"maps"
	"slices"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/host"
)

// Memory is what is remembered of an allocation's registrations, and of what runs in it.
type Memory struct {
	claims    map[string]Claim // by ID of the registration
	tasks     []string         // names of what runs, as far as they can be told; as of the last look
	listens   []uint16         // where sockets under the proxy's UID listen, as far as it could be seen
	heard     bool             // ... asked since the tasks were last looked at
	running   time.Time        // since when its tasks are seen to run
	lookAgain time.Time        // for its tasks
	looks     int              // that were made for the registrations that there are
	absent    time.Time        // since when Consul has no registration of its proxy; zero: it has
}

// Remember keeps the claims of the registrations that there are.
func (m *Memory) Remember(proxies []registration.Proxy, now time.Time) {
	next := make(map[string]Claim, len(proxies))
	for _, p := range proxies {
		c, seen := m.claims[p.ID]
		if !seen {
			c.Since, m.lookAgain, m.looks = now, time.Time{}, 0
		}
		next[p.ID] = c
	}
	m.claims = next
}

// Due reports whether it is time to look at the allocation's tasks, at first
// often, then ever more seldom.
func (m *Memory) Due(now time.Time) bool {
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

// doubts reports whether the task of some registration was not seen yet.
func (m *Memory) doubts() bool {
	for _, c := range m.claims {
		if !c.Shown {
			return true
		}
	}
	return false
}

// Look takes in what runs in the allocation's namespace, by the cgroups that were found
// in each; without an entry nobody could look, and what was seen stays.
func (m *Memory) Look(s desired.Allocation, cgroups map[string][]string, containers discover.Containers, now time.Time) {
	if paths, looked := cgroups[s.NetNS]; looked {
		m.Saw(tasksOf(paths, s.Job.AllocID, containers), now)
	}
}

// Saw takes in the names of the tasks that run.
func (m *Memory) Saw(tasks []string, now time.Time) {
	m.tasks, m.heard = tasks, false
	if len(tasks) > 0 && m.running.IsZero() {
		m.running = now
	}
}

// Next is when to look at the tasks again; zero where each registration's was seen.
func (m *Memory) Next() (at time.Time, doubtful bool) { return m.lookAgain, m.doubts() }

// Judge leaves an allocation the registrations that count, remembers how it was judged, and
// tells those that do not count for longer than they may take. defaultUID is the proxy's
// where the job names none.
func (m *Memory) Judge(s *desired.Allocation, known catalog.Data, defaultUID uint32, now time.Time) (foreign []health.Problem) {
	listens := func() []uint16 {
		if m.heard {
			return m.listens
		}
		m.heard = true
		if ports, err := host.ListeningAs(s.NetNS, s.ProxyUID(defaultUID)); err == nil {
			m.listens = ports // a namespace that cannot be asked shows nothing new
		}
		return m.listens
	}
	e := Evidence{Tasks: m.tasks, Listens: listens, Claims: m.claims, Settled: !m.running.IsZero() && now.Sub(m.running) > api.SettleTime}
	counted, others := e.Judge(*s, known)
	for _, p := range s.Proxies {
		c := m.claims[p.ID]
		why, refused := others[p.ID]
		s.Withdrawn = s.Withdrawn || refused && c.Counted
		if c.Counted = !refused; refused && now.Sub(c.Since) > api.SettleTime {
			foreign = append(foreign, why)
		}
		c.Shown = c.Shown || slices.ContainsFunc(m.tasks, func(task string) bool { return registration.Injected(task, []registration.Proxy{p}) })
		m.claims[p.ID] = c
	}
	s.Withdrawn = s.Withdrawn && len(counted) == 0
	s.Proxies = counted
	return foreign
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

// CgroupsIn is host.CgroupsIn for those that can be looked at: of the others it has no
// entry.
func CgroupsIn(namespaces []string) map[string][]string {
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
			maps.Copy(found, one)
		}
	}
	return found
}
