// SPDX-License-Identifier: MPL-2.0

package desired

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// sidecars tells the mesh configuration who the proxies of the workload are. proxies are in order.
func sidecars(o *workload.MeshConfig, proxies []registration.Proxy, mode workload.Mode, known catalog.Data, record *inspect.Record) (problems []health.Problem) {
	redirected := mode == workload.ModeTransparent
	proxies, unmeshed := inMesh(proxies, redirected)
	first := proxies[0]
	problems = ownPorts(o, first, redirected, record)
	o.ExposedPorts = exposedPorts(known, first, record)
	if len(proxies)+len(unmeshed) == 1 {
		return problems
	}
	o.Service = first.OwnService().Name
	owners := ownersOf(known, proxies, record)
	services := map[uint16]bool{first.Local: true}
	ports := listenerPorts{first.Inbound: first}
	if redirected {
		ports[first.OutboundPort()] = first
	}
	take := func(port uint16, p registration.Proxy, what, remedy string) bool {
		taken := ports.take(port, p, what, remedy)
		problems = append(problems, taken...)
		return len(taken) == 0
	}
	for _, p := range slices.Concat(proxies[1:], unmeshed) {
		if len(o.Proxies) == workload.MaxProxies-1 {
			problems = append(problems, health.NewProblem(health.ProblemProxyPorts, "put it into a group of its own", fmt.Sprintf(
				"service %s: a workload has at most %d proxies, and it has more: it gets no connections", p.OwnService().Name, workload.MaxProxies)))
			continue
		}
		if p.Inbound != 0 && !take(p.Inbound, p, "inbound", "give its sidecar_service another port") {
			continue
		}
		next := workload.Sidecar{Service: p.OwnService().Name, InboundPort: p.Inbound, ExposedPorts: exposedPorts(known, p, record)}
		if redirected && p.Inbound != 0 {
			if p.Local != 0 && !services[p.Local] {
				services[p.Local] = true
				next.ServicePorts = []uint16{p.Local}
			}
			if p.Transparent && take(p.OutboundPort(), p, "outbound", "set transparent_proxy.outbound_listener_port of one of them, for example in its service-defaults") {
				next.OutboundPort = p.OutboundPort()
				next.VirtualIPs = owners[p.ID]
			}
		}
		o.Proxies = append(o.Proxies, next)
	}
	return append(problems, unknownOwners(known, proxies)...)
}

// unknownOwners tells that nobody could say which of several proxies may dial what.
func unknownOwners(known catalog.Data, proxies []registration.Proxy) []health.Problem {
	if known.NoIntentions.What == "" || len(registration.Transparent(proxies)) < 2 {
		return nil
	}
	return []health.Problem{known.NoIntentions}
}

// inMesh tells the proxies that have a listener for the mesh from the others. The first is
// that of the workload's own service.
func inMesh(all []registration.Proxy, redirected bool) (proxies, unmeshed []registration.Proxy) {
	unmeshed = slices.DeleteFunc(slices.Clone(all), func(p registration.Proxy) bool { return p.Inbound != 0 })
	proxies = slices.DeleteFunc(slices.Clone(all), func(p registration.Proxy) bool { return p.Inbound == 0 })
	if len(proxies) == 0 { // gateways, which come in no order
		proxies, unmeshed = unmeshed[:1], unmeshed[1:]
	}
	if i := slices.IndexFunc(proxies, func(p registration.Proxy) bool { return p.Transparent }); redirected && i > 0 {
		// Without a listener for what goes out it cannot be the first.
		first := proxies[i]
		proxies = slices.Insert(slices.Delete(proxies, i, i+1), 0, first)
	}
	return proxies, unmeshed
}

// listenerPorts are the ports of a workload's proxies, with whose each is.
type listenerPorts map[uint16]registration.Proxy

// take gives the port to the proxy, or tells that another has it.
func (l listenerPorts) take(port uint16, p registration.Proxy, what, remedy string) []health.Problem {
	if other, taken := l[port]; taken {
		return []health.Problem{health.NewProblem(health.ProblemProxyPorts, remedy, fmt.Sprintf("%s listener of service %s: port %d is that of service %s already",
			what, p.OwnService().Name, port, other.OwnService().Name))}
	}
	l[port] = p
	return nil
}

// ownPorts takes the ports of the first proxy, unless they are one port: then those
// that the allocation has stay, and it is told.
func ownPorts(o *workload.MeshConfig, first registration.Proxy, redirected bool, record *inspect.Record) []health.Problem {
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
				first.OwnService().Name, first.Inbound))}
	}
	o.InboundPort, o.OutboundPort = first.Inbound, outbound
	return nil
}

// owners gives each virtual IP to the first transparent proxy that an intention
// names as allowed to dial its service. Who is not named owns nothing: that is
// the first proxy's. Until Consul has answered, those on record stay.
func ownersOf(f catalog.Data, proxies []registration.Proxy, record *inspect.Record) map[string][]netip.Addr {
	owned, taken := make(map[string][]netip.Addr), make(map[netip.Addr]bool)
	take := func(p registration.Proxy, list []netip.Addr) {
		for _, addr := range list {
			if !taken[addr] {
				taken[addr] = true
				owned[p.ID] = append(owned[p.ID], addr)
			}
		}
	}
	for _, p := range registration.Transparent(proxies) {
		answered := f.Intentions != nil
		for _, allowed := range f.Intentions {
			if allowed.Names(p) {
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
func onRecordOf(p registration.Proxy, before workload.MeshConfig) []netip.Addr {
	i := slices.IndexFunc(before.Proxies, func(q workload.Sidecar) bool { return q.Service == p.OwnService().Name })
	if i < 0 {
		return nil
	}
	return before.Proxies[i].VirtualIPs
}
