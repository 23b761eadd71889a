// SPDX-License-Identifier: MPL-2.0

// Package desired works out what should be done for an allocation, from what is
// known of it and of Consul and from the operator's policy. It is a pure function.
package desired

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// Policy is the operator's part.
type Policy struct {
	Guard    workload.Guard
	Egress   workload.Guard
	Forward  bool
	ProxyUID uint32
}

// Plan is what should be done for one attachment.
type Plan struct {
	Add        *workload.Request    // put it under Weir first; nil: it is, or need not be
	MeshConfig *workload.MeshConfig // nil: leave it as it is
	Problems   []health.Problem
}

func (w *Plan) problem(code health.ProblemCode, remedy, what string) {
	w.Problems = append(w.Problems, health.NewProblem(code, remedy, what))
}

// For is the pure function from what is known to what should be. Without a
// registration in Consul nothing is wished: what was last known stays.
func For(s Allocation, known catalog.Data, node Policy) Plan {
	var w Plan
	if s.Withdrawn && s.Record != nil {
		w.MeshConfig = s.withoutProxies(node)
	}
	if len(s.Proxies) == 0 {
		return w
	}
	mode, guard, egress := w.decideMode(s, node)
	if s.Record == nil && s.Asked() {
		return w // the plugin's, whose request comes first
	}
	meshConfig := workload.MeshConfig{Guard: guard, Egress: egress, Forward: node.Forward}
	proxies := registration.InOrder(s.Proxies)
	w.Problems = append(w.Problems, sidecars(&meshConfig, proxies, mode, known, s.Record)...)
	var open []uint16
	for _, p := range proxies {
		if p.ExposeCheck && known.NoChecks.What != "" {
			w.Problems = append(w.Problems, known.NoChecks)
		}
		meshConfig.Upstreams = append(meshConfig.Upstreams, upstreams(p, known, s.Record)...)
		if why := known.Unanswered[p.Self]; why.What != "" && p.IsGateway() {
			w.Problems = append(w.Problems, why)
		}
		w.tellUnanswered(p, known)
	}
	if mode == workload.ModeTransparent && s.portsKnown() {
		open = append(open, s.StaticPorts(s.Args.UnnamedPorts(), meshConfig.InboundPort)...)
	} else {
		open = append(open, s.openPorts()...)
	}
	open = slices.DeleteFunc(open, func(port uint16) bool {
		return port == meshConfig.InboundPort || slices.ContainsFunc(meshConfig.Proxies, func(p workload.Sidecar) bool { return p.InboundPort == port })
	})
	meshConfig.ExcludeInboundPorts = registration.SortedPorts(open)
	meshConfig.Upstreams = firstListeners(meshConfig.Upstreams)
	w.MeshConfig = &meshConfig
	if mode == workload.ModeTransparent && s.Record != nil {
		w.Problems = append(w.Problems, s.portsInMesh(meshConfig)...)
	}
	return w
}

// withoutProxies is what stays of the mesh configuration where no registration counts any more.
func (s Allocation) withoutProxies(node Policy) *workload.MeshConfig {
	meshConfig := workload.MeshConfig{
		Guard: workload.MaxGuard(node.Guard, s.Record.Request.Guard), Egress: workload.MaxEgress(node.Egress, s.Record.Request.Egress),
	}
	if s.Record.Request.Mode != workload.ModeTransparent {
		meshConfig.ExcludeInboundPorts = s.openPorts()
	}
	return &meshConfig
}

// portsKnown reports whether libcni says which ports the job maps, or nobody ever did.
func (s Allocation) portsKnown() bool { return s.Cached || s.Record == nil }

// openPorts are those that the guard lets in besides the proxy's: what the job maps, or
// without libcni's result what was last known of it.
func (s Allocation) openPorts() []uint16 {
	if s.portsKnown() {
		return s.MappedPorts()
	}
	return slices.Clone(s.Record.MeshConfig.ExcludeInboundPorts)
}

// tellUnanswered tells of the proxy's upstreams whose virtual IPs Consul did not answer.
func (w *Plan) tellUnanswered(p registration.Proxy, known catalog.Data) {
	for _, u := range p.Upstreams {
		if why := known.Unanswered[u.Of]; why.What != "" && !u.Remote {
			w.Problems = append(w.Problems, why)
		}
	}
}

// decideMode is the mode of the allocation, and its guards: those of its record, or what
// its proxies make of it where it has none yet and the agent has to add it.
func (w *Plan) decideMode(s Allocation, node Policy) (mode workload.Mode, guard workload.Guard, egress workload.Guard) {
	mode, guard, egress = workload.ModeDirect, node.Guard, workload.MaxEgress(node.Egress, "")
	transparent := false
	for _, p := range s.Proxies {
		transparent = transparent || p.Transparent
		if p.IsGateway() {
			mode = workload.ModeGateway
		}
		guard, egress = workload.MaxGuard(guard, p.Guard), workload.MaxEgress(egress, p.Egress)
		for _, what := range p.Problems {
			w.problem(health.ProblemRegistration, "correct its job's connect block and run the job again", what)
		}
	}
	switch {
	case s.Record != nil:
		mode = s.Record.Request.Mode
		guard, egress = workload.MaxGuard(guard, s.Record.Request.Guard), workload.MaxEgress(egress, s.Record.Request.Egress)
		if mode == workload.ModeTransparent && !transparent {
			w.problem(health.ProblemModeMismatch, `set mode = "transparent" in the service's service-defaults or in proxy-defaults`,
				"it is redirected, but Consul has its proxy in direct mode, without an outbound listener")
		}
	case !s.Asked():
		w.Add = &workload.Request{
			Network: s.Network, Job: s.Job, Mode: mode, ProxyUID: node.ProxyUID, Addresses: s.Addresses,
		}
		if transparent {
			w.problem(health.ProblemModeMismatch, "give the job a transparent_proxy block, or take the mode from service-defaults or proxy-defaults",
				"Consul has its proxy in transparent mode, but the job has no transparent_proxy block: its connections pass the mesh")
		}
	}
	return mode, guard, egress
}

// portsInMesh tells of host ports that lead to the proxy's listener for the mesh:
// dynamic ones that have the same number inside, which no exclusion can name.
func (s Allocation) portsInMesh(meshConfig workload.MeshConfig) (problems []health.Problem) {
	open := slices.Concat(OpenPorts(meshConfig), s.Record.Request.ExcludeInboundPorts, []uint16{meshConfig.InboundPort, s.Record.Request.InboundPort})
	for _, p := range meshConfig.Proxies {
		open = append(open, p.InboundPort)
	}
	var told []uint16
	for _, mapping := range s.Ports {
		port := mapping.HostPort
		dynamic := port >= discover.FirstDynamic && port <= discover.LastDynamic && (mapping.ContainerPort == port || mapping.ContainerPort == 0)
		if !dynamic || slices.Contains(open, port) || slices.Contains(told, port) {
			continue
		}
		told = append(told, port)
		problems = append(problems, health.NewProblem(health.ProblemHostPortInMesh,
			`give the label the number that the task listens on, port "LABEL" { to = 8080 }, and exclude that one, transparent_proxy { exclude_inbound_ports = ["8080"] }; where only the mesh needs it, take the label away`,
			fmt.Sprintf("port %d of the host leads to the proxy's mTLS listener: its label in the job's network block has no fixed number inside, which could be excluded", port)))
	}
	return problems
}

// exposed are the ports of the proxy's listeners beside the mesh's. Those on
// record stay until Consul has answered; an older record has them among the excluded.
func exposedPorts(f catalog.Data, p registration.Proxy, record *inspect.Record) []uint16 {
	ports := slices.Concat(p.Open, f.GatewayPorts[p.Entry()])
	if p.ExposeCheck {
		ports = append(ports, f.CheckPorts[p.ServiceID]...)
		ports = append(ports, f.CheckPorts[p.ID]...)
	}
	if record != nil && lacksPorts(f, p) {
		before := record.MeshConfig
		ports = append(ports, before.ExcludeInboundPorts...)
		i := slices.IndexFunc(before.Proxies, func(q workload.Sidecar) bool { return q.Service == p.OwnService().Name })
		if i >= 0 {
			ports = append(ports, before.Proxies[i].ExposedPorts...)
		} else {
			ports = append(ports, before.ExposedPorts...)
		}
	}
	return registration.SortedPorts(ports)
}

// lacksPorts reports whether some of the proxy's listeners are not known yet.
func lacksPorts(f catalog.Data, p registration.Proxy) bool {
	_, answered := f.GatewayPorts[p.Entry()]
	return !answered && (p.Kind == registration.KindIngress || p.Kind == registration.KindAPI) || p.ExposeCheck && f.CheckPorts == nil
}

// upstreams are the explicit upstreams of a proxy that have a virtual IP: the
// one on record until Consul has answered.
func upstreams(p registration.Proxy, known catalog.Data, record *inspect.Record) []workload.Upstream {
	var list []workload.Upstream
	for _, u := range p.Upstreams {
		addresses, answered := known.VirtualIPs[u.Of]
		if !answered && record != nil {
			for _, before := range record.MeshConfig.Upstreams {
				if before.Name == u.Of.Label() {
					addresses = append(addresses, before.Addresses...)
				}
			}
		}
		if u.Remote || len(addresses) == 0 {
			continue
		}
		list = append(list, workload.Upstream{Name: u.Of.Label(), Addresses: slices.Clone(addresses), Listener: u.Listener})
	}
	slices.SortFunc(list, byListener)
	return list
}

func byListener(a, b workload.Upstream) int {
	return cmp.Or(strings.Compare(a.Name, b.Name), a.Listener.Compare(b.Listener))
}

// firstListeners gives a virtual IP that several upstreams have to the first,
// and sorts the upstreams: the kernel has one row for an address. Those of a
// former proxy come first, those of one proxy by their listeners.
func firstListeners(list []workload.Upstream) []workload.Upstream {
	taken := make(map[netip.Addr]bool)
	var kept []workload.Upstream
	for _, u := range list {
		u.Addresses = slices.DeleteFunc(u.Addresses, func(addr netip.Addr) bool { return taken[addr] })
		for _, addr := range u.Addresses {
			taken[addr] = true
		}
		if len(u.Addresses) > 0 {
			kept = append(kept, u)
		}
	}
	slices.SortFunc(kept, byListener)
	return kept
}

// OpenPorts are those that Consul and the job's mapped ports open: exposed ones
// to the proxy alone.
func OpenPorts(meshConfig workload.MeshConfig) []uint16 {
	ports := slices.Concat([]uint16{}, meshConfig.ExcludeInboundPorts, meshConfig.ExposedPorts)
	for _, p := range meshConfig.Proxies {
		ports = append(ports, p.ExposedPorts...)
	}
	return registration.SortedPorts(ports)
}
