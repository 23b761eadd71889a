// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/workload"
)

// intention is one that allows a service, named by itself, to dial another.
type intention struct{ Source, Destination service }

// serviceOf is a service as an intention names it, where the free edition has a
// namespace "default".
func serviceOf(name, namespace, partition string) service {
	const standard = "default"
	if namespace == standard {
		namespace = ""
	}
	if partition == standard {
		partition = ""
	}
	return service{Name: name, Namespace: namespace, Partition: partition}
}

// names reports whether the source is the proxy's service.
func (i intention) names(p proxy) bool {
	of := p.service()
	return i.Source == serviceOf(of.Name, of.Namespace, of.Partition)
}

// inOrder sorts the proxies of an allocation by the names of their services:
// the order in which they own what several claim.
func inOrder(proxies []proxy) []proxy {
	proxies = slices.Clone(proxies)
	slices.SortStableFunc(proxies, func(a, b proxy) int {
		return cmp.Or(cmp.Compare(a.service().Name, b.service().Name), cmp.Compare(a.ID, b.ID))
	})
	return proxies
}

// service is that whose sidecar the proxy is, or the gateway itself.
func (p proxy) service() service {
	of := p.Self
	of.Name = cmp.Or(p.Service, p.ServiceID, of.Name)
	return of
}

// transparent are the sidecars that take what no rule exempts.
func transparent(proxies []proxy) []proxy {
	return slices.DeleteFunc(inOrder(proxies), func(p proxy) bool { return !p.Transparent })
}

// outbound is where Consul puts the listener.
func (p proxy) outbound() uint16 { return cmp.Or(p.Outbound, workload.DefaultOutboundPort) }

// sidecars tells the mesh configuration who the proxies of the workload are. proxies are in order.
func sidecars(o *workload.MeshConfig, proxies []proxy, mode workload.Mode, known catalogData, record *redirect.Record) (problems []health.Problem) {
	unmeshed := slices.DeleteFunc(slices.Clone(proxies), func(p proxy) bool { return p.Inbound != 0 })
	proxies = slices.DeleteFunc(slices.Clone(proxies), func(p proxy) bool { return p.Inbound == 0 })
	if len(proxies) == 0 { // gateways, which come in no order
		proxies, unmeshed = unmeshed[:1], unmeshed[1:]
	}
	redirected := mode == workload.ModeTransparent
	if i := slices.IndexFunc(proxies, func(p proxy) bool { return p.Transparent }); redirected && i > 0 {
		// Without a listener for what goes out it cannot be the first.
		first := proxies[i]
		proxies = slices.Insert(slices.Delete(proxies, i, i+1), 0, first)
	}
	first := proxies[0]
	problems = ownPorts(o, first, redirected, record)
	o.ExposedPorts = known.exposed(first, record)
	if len(proxies)+len(unmeshed) == 1 {
		return problems
	}
	o.Service = first.service().Name
	owners := known.owners(proxies, record)
	services := map[uint16]bool{first.Local: true}
	ports := map[uint16]proxy{first.Inbound: first}
	if redirected {
		ports[first.outbound()] = first
	}
	take := func(port uint16, p proxy, what, remedy string) bool {
		if other, taken := ports[port]; taken {
			problems = append(problems, health.NewProblem(health.ProblemProxyPorts, remedy, fmt.Sprintf("%s listener of service %s: port %d is that of service %s already",
				what, p.service().Name, port, other.service().Name)))
			return false
		}
		ports[port] = p
		return true
	}
	for _, p := range slices.Concat(proxies[1:], unmeshed) {
		if len(o.Proxies) == workload.MaxProxies-1 {
			problems = append(problems, health.NewProblem(health.ProblemProxyPorts, "put it into a group of its own", fmt.Sprintf(
				"service %s: a workload has at most %d proxies, and it has more: it gets no connections", p.service().Name, workload.MaxProxies)))
			continue
		}
		if p.Inbound != 0 && !take(p.Inbound, p, "inbound", "give its sidecar_service another port") {
			continue
		}
		next := workload.Sidecar{Service: p.service().Name, InboundPort: p.Inbound, ExposedPorts: known.exposed(p, record)}
		if redirected && p.Inbound != 0 {
			if p.Local != 0 && !services[p.Local] {
				services[p.Local] = true
				next.ServicePorts = []uint16{p.Local}
			}
			if p.Transparent && take(p.outbound(), p, "outbound", "set transparent_proxy.outbound_listener_port of one of them, for example in its service-defaults") {
				next.OutboundPort = p.outbound()
				next.VirtualIPs = owners[p.ID]
			}
		}
		o.Proxies = append(o.Proxies, next)
	}
	if known.NoIntentions.What != "" && len(transparent(proxies)) > 1 {
		problems = append(problems, known.NoIntentions)
	}
	return problems
}

// ownPorts takes the ports of the first proxy, unless they are one port: then those
// that the allocation has stay, and it is told.
func ownPorts(o *workload.MeshConfig, first proxy, redirected bool, record *redirect.Record) []health.Problem {
	var outbound, requested uint16
	if redirected && first.Transparent {
		outbound = first.Outbound
	}
	if record != nil {
		requested = record.Request.OutboundPort
	}
	if first.Inbound == cmp.Or(outbound, requested, workload.DefaultOutboundPort) {
		return []health.Problem{health.NewProblem(health.ProblemProxyPorts,
			"give its sidecar_service another port, or set another transparent_proxy.outbound_listener_port in its service-defaults",
			fmt.Sprintf("service %s: port %d is registered for the inbound listener and is that of the outbound one; the ports from before stay",
				first.service().Name, first.Inbound))}
	}
	o.InboundPort, o.OutboundPort = first.Inbound, outbound
	return nil
}

// owners gives each virtual IP to the first transparent proxy that an intention
// names as allowed to dial its service. Who is not named owns nothing: that is
// the first proxy's. Until Consul has answered, those on record stay.
func (f catalogData) owners(proxies []proxy, record *redirect.Record) map[string][]netip.Addr {
	owned, taken := make(map[string][]netip.Addr), make(map[netip.Addr]bool)
	take := func(p proxy, list []netip.Addr) {
		for _, addr := range list {
			if !taken[addr] {
				taken[addr] = true
				owned[p.ID] = append(owned[p.ID], addr)
			}
		}
	}
	for _, p := range transparent(proxies) {
		answered := f.Intentions != nil
		for _, allowed := range f.Intentions {
			if allowed.names(p) {
				list, known := f.VirtualIPs[allowed.Destination]
				take(p, list)
				answered = answered && known
			}
		}
		if !answered && record != nil {
			take(p, onRecordOf(p, record.MeshConfig))
		}
	}
	return owned
}

// onRecordOf are the virtual IPs that the proxy owned so far.
func onRecordOf(p proxy, before workload.MeshConfig) []netip.Addr {
	i := slices.IndexFunc(before.Proxies, func(q workload.Sidecar) bool { return q.Service == p.service().Name })
	if i < 0 {
		return nil
	}
	return before.Proxies[i].VirtualIPs
}

// dialledServices are the services that intentions allow the transparent proxies of
// groups with several to dial, by name.
func dialledServices(byAllocation map[string][]proxy, intentions []intention) (services []service) {
	for alloc, list := range byAllocation {
		list = transparent(list)
		if alloc == "" || len(list) < 2 {
			continue
		}
		for _, allowed := range intentions {
			if slices.ContainsFunc(list, allowed.names) {
				services = append(services, allowed.Destination)
			}
		}
	}
	return services
}

// competing reports whether proxies of one allocation compete for virtual IPs:
// those of no allocation are not known to share one.
func competing(byAllocation map[string][]proxy) bool {
	for alloc, list := range byAllocation {
		if alloc != "" && len(transparent(list)) > 1 {
			return true
		}
	}
	return false
}
