// SPDX-License-Identifier: MPL-2.0

package workload

import (
	"fmt"
	"net/netip"
	"slices"
)

// MaxProxies is how many proxies a workload has at most.
const MaxProxies = 8 // SEATS

// Sidecar is a proxy of a workload beside its first one: that of another service
// of the group. All of them run under the same UID, and the workload's
// upstreams are those of all.
type Sidecar struct {
	Service      string       `json:"service"` // whose sidecar it is
	InboundPort  uint16       `json:"inbound_port,omitempty"`
	OutboundPort uint16       `json:"outbound_port,omitempty"` // 0: nothing is redirected to it
	ServicePorts []uint16     `json:"service_ports,omitempty"` // a connection to one from outside is this proxy's
	VirtualIPs   []netip.Addr `json:"virtual_ips,omitempty"`   // a connection to one from inside is this proxy's
	ExposedPorts []uint16     `json:"exposed_ports,omitempty"` // as MeshConfig has them
}

func (p Sidecar) clone() Sidecar {
	p.ServicePorts = sorted(slices.Clone(p.ServicePorts))
	p.ExposedPorts = sorted(slices.Clone(p.ExposedPorts))
	p.VirtualIPs = slices.Clone(p.VirtualIPs)
	for i, addr := range p.VirtualIPs {
		p.VirtualIPs[i] = addr.Unmap()
	}
	slices.SortFunc(p.VirtualIPs, netip.Addr.Compare)
	p.VirtualIPs = slices.Compact(p.VirtualIPs)
	return p
}

func (p Sidecar) equal(other Sidecar) bool {
	return p.Service == other.Service && p.InboundPort == other.InboundPort && p.OutboundPort == other.OutboundPort &&
		slices.Equal(p.ServicePorts, other.ServicePorts) && slices.Equal(p.ExposedPorts, other.ExposedPorts) && slices.Equal(p.VirtualIPs, other.VirtualIPs)
}

// All returns every proxy of the workload, the first one first.
func (w Workload) All() []Sidecar {
	first := Sidecar{Service: w.Service, InboundPort: w.InboundPort, OutboundPort: w.OutboundPort, ExposedPorts: w.ExposedPorts}
	return append([]Sidecar{first}, w.Proxies...)
}

func (w Workload) validateProxies() error {
	proxies := w.All()
	if len(proxies) > MaxProxies {
		return fmt.Errorf("%d proxies: a workload has at most %d", len(proxies), MaxProxies)
	}
	taken := make(map[uint16]bool)
	for _, p := range w.Ports() {
		if taken[p.Port] {
			return fmt.Errorf("port %d: two listeners of its proxies have it", p.Port)
		}
		taken[p.Port] = true
	}
	for _, p := range w.Proxies {
		if p.InboundPort == 0 && len(p.ServicePorts) > 0 || p.OutboundPort == 0 && len(p.VirtualIPs) > 0 {
			return fmt.Errorf("proxy of %q: it has no listener for what it owns", p.Service)
		}
		for _, addr := range p.VirtualIPs {
			if !addr.IsValid() || addr.IsUnspecified() {
				return fmt.Errorf("proxy of %q: address %q: not a virtual IP", p.Service, addr)
			}
		}
	}
	return nil
}

// A proxy ID is where the kernel keeps what it learned of a proxy. A proxy keeps
// its proxy ID for as long as it can be recognised, whatever the order of proxies.

// ProxyID is that of the i-th proxy.
func (w Workload) ProxyID(i int) uint8 {
	if i < len(w.Seats) {
		return w.Seats[i]
	}
	return uint8(i)
}

// TakenProxyIDs has a bit for each proxy ID.
func (w Workload) TakenProxyIDs() (bits uint8) {
	for i := range w.All() {
		bits |= 1 << w.ProxyID(i)
	}
	return bits
}

// NextProxyIDs are those of next's proxies, where w is what was before: a proxy is
// recognised by its service, else by a port, else as the only one.
func (w Workload) NextProxyIDs(next Workload) []uint8 {
	before, after := w.All(), next.All()
	proxyIDs := make([]int, len(after))
	for i := range proxyIDs {
		proxyIDs[i] = -1
	}
	recognise := func(same func(a, b Sidecar) bool) { w.recogniseProxies(after, proxyIDs, same) }
	shared := func(a, b uint16) bool { return a != 0 && a == b }
	recognise(func(a, b Sidecar) bool { return a.Service != "" && a.Service == b.Service })
	// Where nothing is redirected the port is the default of whoever is first.
	if w.Mode == ModeTransparent && next.Mode == ModeTransparent {
		recognise(func(a, b Sidecar) bool { return shared(a.OutboundPort, b.OutboundPort) })
	}
	recognise(func(a, b Sidecar) bool { return shared(a.InboundPort, b.InboundPort) })
	recognise(func(_, _ Sidecar) bool { return len(before) == 1 && len(after) == 1 })
	// What is new sits where nobody sat, as long as there is room.
	known, inOrder := w.TakenProxyIDs(), true
	seatNewProxies(proxyIDs, func(proxyID int) bool { return known>>proxyID&1 == 0 })
	seatNewProxies(proxyIDs, func(int) bool { return true })
	result := make([]uint8, len(proxyIDs))
	for i, proxyID := range proxyIDs {
		result[i] = uint8(max(proxyID, 0))
		inOrder = inOrder && proxyID == i
	}
	if inOrder {
		return nil
	}
	return result
}

// recogniseProxies gives those of the new proxies that have no proxy ID yet the one of a
// former proxy that is the same.
func (w Workload) recogniseProxies(after []Sidecar, proxyIDs []int, same func(a, b Sidecar) bool) {
	for i, p := range after {
		for j, q := range w.All() {
			if proxyID := int(w.ProxyID(j)); proxyIDs[i] < 0 && same(p, q) && !slices.Contains(proxyIDs, proxyID) {
				proxyIDs[i] = proxyID
			}
		}
	}
}

// seatNewProxies gives those without a proxy ID a vacant one each.
func seatNewProxies(proxyIDs []int, vacant func(proxyID int) bool) {
	for proxyID := range MaxProxies {
		if i := slices.Index(proxyIDs, -1); i >= 0 && vacant(proxyID) && !slices.Contains(proxyIDs, proxyID) {
			proxyIDs[i] = proxyID
		}
	}
}

// ProxyPort is where a listener of a proxy is.
type ProxyPort struct {
	Port     uint16
	ProxyID  uint8
	Outbound bool
	Exposed  bool
}

// Ports are all ports of the workload's proxies: those of the mesh, and then
// the exposed ones.
func (w Workload) Ports() []ProxyPort { return append(w.MeshPorts(), w.Exposed()...) }

// Exposed are the ports on which proxies listen for what is not the mesh's. A
// port has one meaning: that for the mesh, else the first proxy's.
func (w Workload) Exposed() (list []ProxyPort) {
	taken := make(map[uint16]bool)
	for _, p := range w.MeshPorts() {
		taken[p.Port] = true
	}
	for i, p := range w.All() {
		for _, port := range p.ExposedPorts {
			if port != 0 && !taken[port] {
				taken[port] = true
				list = append(list, ProxyPort{Port: port, ProxyID: w.ProxyID(i), Exposed: true})
			}
		}
	}
	return list
}

// MeshPorts are those for connections of the mesh, outbound before inbound.
func (w Workload) MeshPorts() (list []ProxyPort) {
	for i, p := range w.All() {
		if p.OutboundPort != 0 {
			list = append(list, ProxyPort{Port: p.OutboundPort, ProxyID: w.ProxyID(i), Outbound: true})
		}
		if p.InboundPort != 0 {
			list = append(list, ProxyPort{Port: p.InboundPort, ProxyID: w.ProxyID(i)})
		}
	}
	return list
}

// PortOf returns the proxy's port of that number.
func (w Workload) PortOf(number uint16) (found ProxyPort, ok bool) {
	ports := w.Ports()
	i := slices.IndexFunc(ports, func(p ProxyPort) bool { return p.Port == number })
	if i < 0 {
		return found, false
	}
	return ports[i], true
}

func SamePorts(a, b Workload) bool { return slices.Equal(a.Ports(), b.Ports()) }
