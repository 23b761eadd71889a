// SPDX-License-Identifier: MPL-2.0

// Package registration is what Consul says of the proxies of a node, as far as it
// matters here. It is a pure reading: nothing is asked.
package registration

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/redirect/workload"
)

// The kinds of proxies as Consul names them.
const (
	KindSidecar     = "connect-proxy"
	KindMesh        = "mesh-gateway"
	KindIngress     = "ingress-gateway"
	kindTerminating = "terminating-gateway"
	KindAPI         = "api-gateway"
)

// The keys of a registration's meta by which a job asks for a stronger guard.
const (
	guardMeta  = "weir-guard"
	EgressMeta = "weir-egress"
)

// gateMeta is that by which a job shortens the time that its connections wait for
// a proxy which starts.
const gateMeta = "weir-gate"

// Service names a service in Consul. Namespace and partition are empty in the
// free edition, the peer where it is none of another cluster's.
type Service struct{ Name, Namespace, Partition, Peer string }

// Label is what operators read: that of a peer's is the beginning of its name in
// Consul's DNS.
func (s Service) Label() string {
	if s.Peer == "" {
		return s.Name
	}
	return s.Name + "." + s.Peer
}

// Gateway names a gateway's configuration entry.
type Gateway struct {
	Service
	Kind string
}

// Proxy is what Consul knows of one proxy of this node, as far as it matters
// to the kernel.
type Proxy struct {
	ID          string
	Kind        string
	AllocID     string     // from the ID that Nomad gives; empty where another made it
	Address     netip.Addr // as registered
	Self        Service    // the proxy itself, for a gateway
	ServiceID   string     // the service that it is the sidecar of
	Service     string     // ... its name
	Local       uint16     // ... its port in the namespace; 0: not known
	Transparent bool
	Inbound     uint16   // 0 for a gateway
	Outbound    uint16   // 0 where Consul does not say
	Open        []uint16 // further listeners: expose paths, metrics, a gateway's own
	ExposeCheck bool     // further listeners, which only the checks name
	BindsAsNode bool     // a gateway without listeners of its own choosing, which Nomad gives to each in a namespace
	Upstreams   []Upstream
	Guard       workload.Guard // "" where the job does not ask
	Egress      workload.Guard // likewise
	Gate        *time.Duration // nil where the job does not ask
	Problems    []string
}

// Upstream is an explicit upstream of a proxy.
type Upstream struct {
	Of       Service
	Listener netip.AddrPort
	Remote   bool // in another datacenter, or no single service: it has no virtual IP here
}

// IsGateway reports whether the proxy is one of the gateways.
func (p Proxy) IsGateway() bool { return p.Kind != KindSidecar }

// Entry names the configuration entry of a gateway.
func (p Proxy) Entry() Gateway { return Gateway{Service: p.Self, Kind: p.Kind} }

// Registration is what is read of Consul's own form.
type Registration struct {
	Kind, ID, Service    string
	Address              string
	Port                 int
	Namespace, Partition string
	Datacenter           string
	Meta                 map[string]string
	TaggedAddresses      map[string]struct{ Port int }
	Proxy                struct {
		DestinationServiceID   string
		DestinationServiceName string
		LocalServicePort       int
		Mode                   string
		TransparentProxy       struct{ OutboundListenerPort int }
		Config                 map[string]json.RawMessage
		Upstreams              []struct {
			DestinationType, DestinationNamespace, DestinationPartition string
			DestinationPeer, DestinationName, Datacenter                string
			LocalBindAddress, LocalBindSocketPath                       string
			LocalBindPort                                               int
		}
		Expose struct {
			Checks bool
			Paths  []struct{ ListenerPort int }
		}
	}
}

// ParseServices reads the bulk answer; loopback is where listeners are that name
// no address. A registration that cannot be read does
// not hide the others; problems has a line for each.
func ParseServices(body []byte, loopback netip.Addr) (proxies []Proxy, problems []string, err error) {
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(body, &raw); err != nil {
		return nil, nil, fmt.Errorf("read services from Consul: %w", err)
	}
	if raw == nil { // "null" is nobody's answer: a node without proxies is {}
		return nil, nil, fmt.Errorf("read services from Consul: %w", ErrEmpty)
	}
	for _, id := range slices.Sorted(maps.Keys(raw)) {
		var r Registration
		if err := json.Unmarshal(raw[id], &r); err != nil {
			problems = append(problems, fmt.Sprintf("registration %s cannot be read: %v", id, err))
			continue
		}
		r.ID = id
		switch r.Kind {
		case KindSidecar, KindMesh, KindIngress, kindTerminating, KindAPI:
			proxies = append(proxies, r.Parse(loopback))
		}
	}
	return proxies, problems, nil
}

func (r Registration) Parse(loopback netip.Addr) Proxy {
	p := Proxy{
		ID: r.ID, Kind: r.Kind, AllocID: AllocID(r.ID), ServiceID: r.Proxy.DestinationServiceID,
		Self:        Service{Name: r.Service, Namespace: r.Namespace, Partition: r.Partition},
		Transparent: r.Kind == KindSidecar && r.Proxy.Mode == "transparent",
		ExposeCheck: r.Proxy.Expose.Checks, Service: r.Proxy.DestinationServiceName,
	}
	p.Local, _ = PortNumber(r.Proxy.LocalServicePort)
	p.Address, _ = netip.ParseAddr(r.Address) // a name is no address of an allocation
	own, hasOwn := PortNumber(r.Port)
	if bind, ok := configPort(r.Proxy.Config["bind_port"]); ok {
		own, hasOwn = bind, true
	}
	switch {
	case !p.IsGateway():
		p.Inbound = own
		if !hasOwn {
			p.problem("its registration names no port")
		}
	case p.Kind == KindAPI: // its listeners are those of its configuration entry alone
	case !configTrue(r.Proxy.Config["envoy_gateway_no_default_bind"]) && hasOwn:
		p.Open = append(p.Open, own)
	}
	p.BindsAsNode = p.IsGateway() && p.Kind != KindAPI && !configTrue(r.Proxy.Config["envoy_gateway_no_default_bind"]) &&
		!configTrue(r.Proxy.Config["envoy_gateway_bind_tagged_addresses"]) && len(r.Proxy.Config["envoy_gateway_bind_addresses"]) == 0
	if p.Transparent {
		p.Outbound, _ = PortNumber(r.Proxy.TransparentProxy.OutboundListenerPort)
	}
	if p.Kind != KindAPI {
		p.Open = append(p.Open, r.binds()...)
	}
	for _, key := range []string{"envoy_prometheus_bind_addr", "envoy_stats_bind_addr"} {
		p.Open = append(p.Open, bindPort(r.Proxy.Config[key])...)
	}
	for _, path := range r.Proxy.Expose.Paths {
		if port, ok := PortNumber(path.ListenerPort); ok {
			p.Open = append(p.Open, port)
		}
	}
	p.Open = SortedPorts(p.Open)
	r.upstreams(&p, loopback)
	r.wishes(&p)
	return p
}

// problem tells of what cannot be taken as it is.
func (p *Proxy) problem(text string, args ...any) {
	p.Problems = append(p.Problems, fmt.Sprintf(text, args...))
}

// upstreams reads the explicit ones.
func (r Registration) upstreams(p *Proxy, loopback netip.Addr) {
	for _, u := range r.Proxy.Upstreams {
		port, ok := PortNumber(u.LocalBindPort)
		if !ok {
			continue // a Unix socket, or central defaults: Consul refuses any other
		}
		listener, err := listenerOf(u.LocalBindAddress, loopback, port)
		if err != nil {
			p.problem("upstream %s: %v", u.DestinationName, err)
			continue
		}
		p.Upstreams = append(p.Upstreams, Upstream{
			Of:       r.service(u.DestinationName, u.DestinationNamespace, u.DestinationPartition, u.DestinationPeer),
			Listener: listener,
			Remote:   u.Datacenter != "" && u.Datacenter != r.Datacenter || u.DestinationType == "prepared_query",
		})
	}
}

// wishes reads what the author of the registration wants of Weir.
func (r Registration) wishes(p *Proxy) {
	for key, field := range map[string]*workload.Guard{guardMeta: &p.Guard, EgressMeta: &p.Egress} {
		asked, ok := r.Meta[key]
		if !ok {
			continue
		}
		guard := workload.Guard(asked)
		if guard.Known() {
			*field = guard
		} else {
			p.problem("meta %s = %q: want off, audit or enforce", key, asked)
		}
	}
	if asked, ok := r.Meta[gateMeta]; ok {
		if timeout, ok := configfile.ParseGate(asked); ok {
			p.Gate = &timeout
		} else {
			p.problem("meta %s = %q: want a duration from 0s to 10m", gateMeta, asked)
		}
	}
}

// service is what the registration names by these, as Consul reads it. The free
// edition takes the names of its only namespace and partition in a registration,
// and in no question.
func (r Registration) service(name, namespace, partition, peer string) Service {
	if r.Namespace == "" && r.Partition == "" {
		of := ServiceOf(name, namespace, partition)
		of.Peer = peer
		return of
	}
	return Service{Name: name, Namespace: cmp.Or(namespace, r.Namespace), Partition: cmp.Or(partition, r.Partition), Peer: peer}
}

// binds are the ports of a gateway's listeners beside the default one. To an API
// gateway the same settings give addresses alone.
func (r Registration) binds() []uint16 {
	ports := gatewayBinds(r.Proxy.Config["envoy_gateway_bind_addresses"])
	if configTrue(r.Proxy.Config["envoy_gateway_bind_tagged_addresses"]) {
		for _, tagged := range r.TaggedAddresses {
			if port, ok := PortNumber(tagged.Port); ok {
				ports = append(ports, port)
			}
		}
	}
	return ports
}

// AllocID takes the allocation's ID out of the ID that Nomad gives to a
// service: _nomad-task-<allocation>-group-...
func AllocID(id string) string {
	const length = 36
	rest, found := strings.CutPrefix(id, "_nomad-task-")
	if !found || len(rest) <= length || rest[length] != '-' || !IsAllocID(rest[:length]) {
		return ""
	}
	return rest[:length]
}

// listenerOf is where a task reaches an upstream's listener: by the loopback
// address also where it listens on every address.
func listenerOf(bind string, loopback netip.Addr, port uint16) (netip.AddrPort, error) {
	addr := loopback
	if bind != "" {
		var err error
		if addr, err = netip.ParseAddr(bind); err != nil {
			return netip.AddrPort{}, fmt.Errorf("local bind address %q is not an address", bind)
		}
	}
	switch addr = addr.Unmap(); {
	case addr == netip.IPv4Unspecified():
		addr = Loopback4()
	case addr == netip.IPv6Unspecified():
		addr = netip.IPv6Loopback()
	case !addr.IsLoopback():
		return netip.AddrPort{}, fmt.Errorf("local bind address %s is not a loopback address", addr)
	case addr.Is4() && addr.As4()[1] >= 128:
		return netip.AddrPort{}, fmt.Errorf("local bind address %s is in 127.128.0.0/9, which carries origins", addr)
	}
	return netip.AddrPortFrom(addr, port), nil
}

// configPort reads a port of a proxy's free-form configuration, where it may
// be a number or a text.
func configPort(raw json.RawMessage) (uint16, bool) {
	if len(raw) == 0 {
		return 0, false
	}
	var number float64
	if json.Unmarshal(raw, &number) == nil {
		return PortNumber(int(number))
	}
	var text string
	if json.Unmarshal(raw, &text) != nil {
		return 0, false
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		return 0, false
	}
	return PortNumber(n)
}

func configTrue(raw json.RawMessage) bool {
	text := strings.Trim(string(raw), `"`)
	set, err := strconv.ParseBool(text)
	return err == nil && set
}

// bindPort reads the port of "address:port", as envoy_stats_bind_addr has it.
func bindPort(raw json.RawMessage) []uint16 {
	var text string
	if len(raw) == 0 || json.Unmarshal(raw, &text) != nil {
		return nil
	}
	_, port, err := net.SplitHostPort(text)
	if err != nil {
		return nil
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return nil
	}
	return []uint16{uint16(n)}
}

// gatewayBinds reads envoy_gateway_bind_addresses, whose keys Consul writes in
// either case.
func gatewayBinds(raw json.RawMessage) (ports []uint16) {
	var binds map[string]struct{ Port int }
	if len(raw) == 0 || json.Unmarshal(raw, &binds) != nil {
		return nil
	}
	for _, bind := range binds {
		if port, ok := PortNumber(bind.Port); ok {
			ports = append(ports, port)
		}
	}
	return ports
}

func PortNumber(n int) (uint16, bool) {
	if n < 1 || n > 65535 {
		return 0, false
	}
	return uint16(n), true
}

func SortedPorts(ports []uint16) []uint16 {
	slices.Sort(ports)
	return slices.Compact(ports)
}

func Loopback4() netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, 1}) }

// ErrEmpty is an answer without what every right one has: nothing is taken back
// for it.
var ErrEmpty = errors.New("the answer is empty")

// IsAllocID reports whether text has the form of an allocation's ID.
func IsAllocID(text string) bool {
	if len(text) != 36 {
		return false
	}
	for i, c := range text {
		dash := i == 8 || i == 13 || i == 18 || i == 23
		if dash != (c == '-') || !dash && !strings.ContainsRune("0123456789abcdef", c) {
			return false
		}
	}
	return true
}
