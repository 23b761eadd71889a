// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"fmt"
	"slices"
	"time"

	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/host"
)

// Consul checks who may register a name. What else a registration says is its
// author's: the ID that names an allocation, the address, the ports, the
// metadata. It counts for an allocation only where this node shows that the
// allocation runs that proxy.

// claim is what the loop remembers of a registration that names an allocation.
type claim struct {
	since   time.Time
	shown   bool // the task that Nomad injects for it was seen in the allocation
	counted bool // in the last pass
}

// evidence is what this node shows of the proxies that an allocation runs.
type evidence struct {
	Tasks   []string        // names of its tasks, as far as they can be told from cgroups and containers
	Listens func() []uint16 // where sockets under the proxy's UID listen
	Claims  map[string]claim
	Settled bool // its tasks have run for a while
}

// judge tells the registrations that count, sorted as they came, from the
// others, and why those do not.
func (e evidence) judge(s allocation, known catalogData) (counted []proxy, others map[string]health.Problem) {
	others = make(map[string]health.Problem)
	named := func(p proxy) bool {
		return e.Claims[p.ID].shown || known.runs(s.attachment, p) ||
			slices.ContainsFunc(e.Tasks, func(task string) bool { return injected(task, []proxy{p}) })
	}
	anyNamed := slices.ContainsFunc(s.Proxies, named) || slices.ContainsFunc(e.Tasks, isInjected)
	var byListener []proxy
	for _, p := range s.Proxies {
		switch {
		case named(p):
			counted = append(counted, p)
		case anyNamed && e.Claims[p.ID].counted && !e.Settled:
			counted = append(counted, p) // its task may be on its way
		case anyNamed:
			others[p.ID] = s.foreign(p, "the allocation runs the proxies of other registrations, and none that is injected for this service")
		case e.Tasks == nil && p.AllocID != "" && len(s.Proxies) == 1 && s.maps(p, known):
			counted = append(counted, p) // nothing runs there yet, or names of tasks cannot be told
		case e.Claims[p.ID].counted && !e.Settled:
			counted = append(counted, p)
		case p.AllocID != "" && !p.isGateway() && s.Cached && !s.maps(p, known):
			others[p.ID] = s.foreign(p, fmt.Sprintf("the allocation maps none of its ports %v", p.listeners(known)))
		case !slices.ContainsFunc(p.listeners(known), func(port uint16) bool { return slices.Contains(e.Listens(), port) }):
			others[p.ID] = s.unproven(p)
		default:
			byListener = append(byListener, p)
		}
	}
	// A listener shows that there is a proxy, and not whose: who counted goes on, of
	// several others none is known to be the right one.
	all := slices.Concat(counted, byListener)
	for _, p := range byListener {
		rival := func(q proxy) bool {
			first := e.Claims[p.ID].counted && !e.Claims[q.ID].counted
			return q.ID != p.ID && !first && (p.AllocID == "" || q.AllocID == "" || sharePorts(p, q, known))
		}
		if i := slices.IndexFunc(all, rival); i >= 0 {
			others[p.ID] = s.foreign(p, fmt.Sprintf("registration %s claims the same listener, and no task of the allocation tells whose it is", all[i].ID))
			continue
		}
		counted = append(counted, p)
	}
	return counted, others
}

func (s allocation) foreign(p proxy, why string) health.Problem {
	return health.NewProblem(health.ProblemForeignRegistration,
		"find out who registered it, and deregister it with 'consul services deregister'; where the allocation does run that proxy, leave its task the name that Nomad injects",
		fmt.Sprintf("service %s names allocation %s and changes nothing there: %s", p.Self.Name, s.Job.AllocID, why)).
		Of("registration "+p.ID, s.Job.AllocID)
}

func (s allocation) unproven(p proxy) health.Problem {
	return health.NewProblem(health.ProblemUnprovenRegistration,
		"see whether the allocation's proxy runs; one whose task the job names itself is told by its UID: proxy { default_uid }, or transparent_proxy { uid }",
		fmt.Sprintf("service %s names allocation %s and changes nothing there: no task that Nomad injects for it runs, and nothing listens on its ports under the proxy's UID",
			p.Self.Name, s.Job.AllocID)).
		Of("registration "+p.ID, s.Job.AllocID)
}

// listeners are the ports on which the proxy is for others: that of the mesh, or
// a gateway's.
func (p proxy) listeners(known catalogData) []uint16 {
	if !p.isGateway() {
		return []uint16{p.Inbound}
	}
	return slices.Concat(p.Open, known.GatewayPorts[p.entry()])
}

func sharePorts(p, q proxy, known catalogData) bool {
	ports := q.listeners(known)
	return slices.ContainsFunc(p.listeners(known), func(port uint16) bool { return slices.Contains(ports, port) })
}

// maps reports whether a port of the proxy's is one that Nomad gave to the
// allocation: in the plugin's request, or mapped from the host.
func (s allocation) maps(p proxy, known catalogData) bool {
	own := s.mappedPorts()
	if s.Record != nil && s.Record.Request.InboundPort != 0 {
		own = append(own, s.Record.Request.InboundPort)
	}
	return slices.ContainsFunc(p.listeners(known), func(port uint16) bool { return port != 0 && slices.Contains(own, port) })
}

// identify keeps of the subjects' registrations those that count.
func (a *Agent) identify(allocations []allocation, known catalogData, now time.Time) {
	var due []*allocation
	var namespaces []string
	a.unproven = time.Time{}
	var foreign []health.Problem
	for i := range allocations {
		s := &allocations[i]
		m := a.allocations[s.Key]
		if m == nil {
			m = &allocState{born: now, view: WorkloadView{Since: now}}
			a.allocations[s.Key] = m
		}
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
		m.taskNames = nil
		for _, path := range cgroups[s.NetNS] {
			if task := taskOf(path, s.Job.AllocID, containers); task != "" && !slices.Contains(m.taskNames, task) {
				m.taskNames = append(m.taskNames, task)
			}
		}
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

// identifyOne judges the registrations of one allocation and remembers how.
func (a *Agent) identifyOne(s *allocation, known catalogData, now time.Time) (foreign []health.Problem) {
	m := a.allocations[s.Key]
	listens := func() []uint16 {
		if m.listens == nil { // a namespace that cannot be asked shows nothing
			ports, _ := host.ListeningAs(s.NetNS, s.proxyUID(a.config.Proxy.DefaultUID))
			m.listens = append([]uint16{}, ports...)
		}
		return m.listens
	}
	e := evidence{Tasks: m.taskNames, Listens: listens, Claims: m.claims, Settled: !m.running.IsZero() && now.Sub(m.running) > settleTime}
	counted, others := e.judge(*s, known)
	for _, p := range s.Proxies {
		c := m.claims[p.ID]
		why, refused := others[p.ID]
		s.Withdrawn = s.Withdrawn || refused && c.counted
		if c.counted = !refused; refused && now.Sub(c.since) > settleTime {
			foreign = append(foreign, why)
		}
		c.shown = c.shown || slices.ContainsFunc(m.taskNames, func(task string) bool { return injected(task, []proxy{p}) })
		m.claims[p.ID] = c
	}
	s.Withdrawn = s.Withdrawn && len(counted) == 0
	s.Proxies = counted
	if next := m.lookAgain; m.doubts() && (a.unproven.IsZero() || next.Before(a.unproven)) {
		a.unproven = next
	}
	return foreign
}

// proxyUID is that under which the allocation's proxies run.
func (s allocation) proxyUID(standard uint32) uint32 {
	if s.Record != nil {
		return s.Record.Request.ProxyUID
	}
	return standard
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
func (m *allocState) remember(proxies []proxy, now time.Time) {
	next := make(map[string]claim, len(proxies))
	for _, p := range proxies {
		c, seen := m.claims[p.ID]
		if !seen {
			c.since, m.lookAgain, m.looks = now, time.Time{}, 0
		}
		next[p.ID] = c
	}
	m.claims = next
}

// doubts reports whether the task of some registration was not seen yet.
func (m *allocState) doubts() bool {
	for _, c := range m.claims {
		if !c.shown {
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
		if !c.counted {
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
