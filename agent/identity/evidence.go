// SPDX-License-Identifier: MPL-2.0

// Package identity judges, from what the node shows, which registrations are of
// proxies that an allocation runs.
package identity

import (
	"fmt"
	"slices"
	"time"

	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/health"
)

// Claim is what the loop remembers of a registration that names an allocation.
type Claim struct {
	Since   time.Time
	Shown   bool // the task that Nomad injects for it was seen in the allocation
	Counted bool // in the last pass
}

// Evidence is what this node shows of the proxies that an allocation runs.
type Evidence struct {
	Tasks   []string        // names of its tasks, as far as they can be told from cgroups and containers
	Listens func() []uint16 // where sockets under the proxy's UID listen
	Claims  map[string]Claim
	Settled bool // its tasks have run for a while
}

// Judge tells the registrations that count, sorted as they came, from the
// others, and why those do not.
func (e Evidence) Judge(s desired.Allocation, known catalog.Data) (counted []registration.Proxy, others map[string]health.Problem) {
	others = make(map[string]health.Problem)
	named := func(p registration.Proxy) bool {
		return e.Claims[p.ID].Shown || desired.RunsGateway(known, s.Attachment, p) ||
			slices.ContainsFunc(e.Tasks, func(task string) bool { return registration.Injected(task, []registration.Proxy{p}) })
	}
	anyNamed := slices.ContainsFunc(s.Proxies, named) || slices.ContainsFunc(e.Tasks, registration.IsInjected)
	var byListener []registration.Proxy
	for _, p := range s.Proxies {
		switch {
		case named(p):
			counted = append(counted, p)
		case anyNamed && e.Claims[p.ID].Counted && !e.Settled:
			counted = append(counted, p) // its task may be on its way
		case anyNamed:
			others[p.ID] = foreignRegistration(s, p, "the allocation runs the proxies of other registrations, and none that is injected for this service")
		case e.Tasks == nil && p.AllocID != "" && len(s.Proxies) == 1 && mapsAPort(s, p, known):
			counted = append(counted, p) // nothing runs there yet, or names of tasks cannot be told
		case e.Claims[p.ID].Counted && !e.Settled:
			counted = append(counted, p)
		case p.AllocID != "" && !p.IsGateway() && s.Cached && !mapsAPort(s, p, known):
			others[p.ID] = foreignRegistration(s, p, fmt.Sprintf("the allocation maps none of its ports %v", catalog.ListenersOf(p, known)))
		case !slices.ContainsFunc(catalog.ListenersOf(p, known), func(port uint16) bool { return slices.Contains(e.Listens(), port) }):
			others[p.ID] = unprovenRegistration(s, p)
		default:
			byListener = append(byListener, p)
		}
	}
	// A listener shows that there is a proxy, and not whose: who counted goes on, of
	// several others none is known to be the right one.
	all := slices.Concat(counted, byListener)
	for _, p := range byListener {
		rival := func(q registration.Proxy) bool {
			first := e.Claims[p.ID].Counted && !e.Claims[q.ID].Counted
			return q.ID != p.ID && !first && (p.AllocID == "" || q.AllocID == "" || sharePorts(p, q, known))
		}
		if i := slices.IndexFunc(all, rival); i >= 0 {
			others[p.ID] = foreignRegistration(s, p, fmt.Sprintf("registration %s claims the same listener, and no task of the allocation tells whose it is", all[i].ID))
			continue
		}
		counted = append(counted, p)
	}
	return counted, others
}

func foreignRegistration(s desired.Allocation, p registration.Proxy, why string) health.Problem {
	return health.NewProblem(health.ProblemForeignRegistration,
		"find out who registered it, and deregister it with 'consul services deregister'; where the allocation does run that proxy, leave its task the name that Nomad injects",
		fmt.Sprintf("service %s names allocation %s and changes nothing there: %s", p.Self.Name, s.Job.AllocID, why)).
		Of("registration "+p.ID, s.Job.AllocID)
}

func unprovenRegistration(s desired.Allocation, p registration.Proxy) health.Problem {
	return health.NewProblem(health.ProblemUnprovenRegistration,
		"see whether the allocation's proxy runs; one whose task the job names itself is told by its UID: proxy { default_uid }, or transparent_proxy { uid }",
		fmt.Sprintf("service %s names allocation %s and changes nothing there: no task that Nomad injects for it runs, and nothing listens on its ports under the proxy's UID",
			p.Self.Name, s.Job.AllocID)).
		Of("registration "+p.ID, s.Job.AllocID)
}

func sharePorts(p, q registration.Proxy, known catalog.Data) bool {
	ports := catalog.ListenersOf(q, known)
	return slices.ContainsFunc(catalog.ListenersOf(p, known), func(port uint16) bool { return slices.Contains(ports, port) })
}

// maps reports whether a port of the proxy's is one that Nomad gave to the
// allocation: in the plugin's request, or mapped from the host.
func mapsAPort(s desired.Allocation, p registration.Proxy, known catalog.Data) bool {
	own := s.MappedPorts()
	if s.Record != nil && s.Record.Request.InboundPort != 0 {
		own = append(own, s.Record.Request.InboundPort)
	}
	return slices.ContainsFunc(catalog.ListenersOf(p, known), func(port uint16) bool { return port != 0 && slices.Contains(own, port) })
}
