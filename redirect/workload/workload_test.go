// SPDX-License-Identifier: MPL-2.0

package workload

import (
	"github.com/weirmesh/weir/test"

	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// comparing lets cmp look at addresses.
func comparing() cmp.Options {
	return cmp.Options{
		cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}, netip.Prefix{}),
		cmpopts.EquateEmpty(),
	}
}

func TestMerge(t *testing.T) {
	listener, other := netip.MustParseAddrPort("127.0.0.1:9191"), netip.MustParseAddrPort("127.0.0.1:9192")
	for name, tc := range map[string]struct {
		request    Request
		meshConfig MeshConfig
		want       Workload
	}{
		"defaults": {
			want: Workload{Mode: ModeTransparent, OutboundPort: DefaultOutboundPort, Guard: GuardOff, Budget: DefaultBudget},
		},
		"the request's word": {
			request: Request{Mode: ModeGateway, ProxyUID: 101, InboundPort: 1, OutboundPort: 2, Budget: 3, DNS: DNS{Port: 8600}},
			want: Workload{Mode: ModeGateway, ProxyUID: 101, InboundPort: 1, OutboundPort: 2, Budget: 3, Guard: GuardOff,
				DNS: DNS{Port: 8600}},
		},
		"Consul's ports stand": {
			request:    Request{InboundPort: 1, OutboundPort: 2, Budget: 3},
			meshConfig: MeshConfig{InboundPort: 4, OutboundPort: 5, Guard: GuardAudit},
			want:       Workload{Mode: ModeTransparent, InboundPort: 4, OutboundPort: 5, Budget: 3, Guard: GuardAudit},
		},
		"the request's guard is the least": {
			request:    Request{Mode: ModeDirect, Guard: GuardEnforce},
			meshConfig: MeshConfig{Guard: GuardAudit},
			want:       Workload{Mode: ModeDirect, OutboundPort: DefaultOutboundPort, Guard: GuardEnforce, Budget: DefaultBudget},
		},
		"the request's guard weakens nothing": {
			request:    Request{Mode: ModeDirect, Guard: GuardAudit},
			meshConfig: MeshConfig{Guard: GuardEnforce},
			want:       Workload{Mode: ModeDirect, OutboundPort: DefaultOutboundPort, Guard: GuardEnforce, Budget: DefaultBudget},
		},
		"lists are sorted and without duplicates": {
			request: Request{
				ExcludeInboundPorts: []uint16{9, 7, 9}, ExcludeOutboundPorts: []uint16{3, 1, 3, 2}, ExcludeUIDs: []uint32{70000, 0, 70000},
				ExcludeOutboundCIDRs: test.Prefixes("10.1.2.3/8", "fd00::1/8", "10.0.0.0/8", "10.0.0.0/16"),
			},
			meshConfig: MeshConfig{ExcludeInboundPorts: []uint16{8, 7}},
			want: Workload{
				Mode: ModeTransparent, OutboundPort: DefaultOutboundPort, Guard: GuardOff, Budget: DefaultBudget,
				ExcludeInboundPorts: []uint16{7, 8, 9}, ExcludeOutboundPorts: []uint16{1, 2, 3}, ExcludeUIDs: []uint32{0, 70000},
				ExcludeOutboundCIDRs: test.Prefixes("10.0.0.0/8", "10.0.0.0/16", "fd00::/8"),
			},
		},
		"own addresses keep their order": {
			request: Request{Addresses: test.Addrs("fd09::2", "::ffff:10.9.1.2", "10.9.1.1")},
			want: Workload{Mode: ModeTransparent, OutboundPort: DefaultOutboundPort, Guard: GuardOff, Budget: DefaultBudget,
				Addresses: test.Addrs("fd09::2", "10.9.1.2", "10.9.1.1")},
		},
		"upstreams are sorted": {
			meshConfig: MeshConfig{Upstreams: []Upstream{
				{Name: "db", Addresses: test.Addrs("240.0.0.6", "::ffff:240.0.0.5", "240.0.0.5"), Listener: listener},
				{Name: "cache", Addresses: test.Addrs("240.0.0.7"), Listener: other},
			}},
			want: Workload{Mode: ModeTransparent, OutboundPort: DefaultOutboundPort, Guard: GuardOff, Budget: DefaultBudget,
				Upstreams: []Upstream{
					{Name: "cache", Addresses: test.Addrs("240.0.0.7"), Listener: other},
					{Name: "db", Addresses: test.Addrs("240.0.0.5", "240.0.0.6"), Listener: listener},
				}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got := Merge(tc.request, tc.meshConfig)
			if diff := cmp.Diff(tc.want, got, comparing()); diff != "" {
				t.Errorf("workload (-want +got):\n%s", diff)
			}
			if err := got.Validate(); err != nil {
				t.Errorf("validate: %v", err)
			}
			if !got.Equal(Merge(tc.request, tc.meshConfig)) {
				t.Error("the same wish twice gives two workloads")
			}
		})
	}
}

// Merge has no effect on what it is given.
func TestMergeLeavesItsArguments(t *testing.T) {
	make := func() (Request, MeshConfig) {
		return Request{
				ExcludeInboundPorts: []uint16{2, 1}, ExcludeOutboundPorts: []uint16{2, 1}, ExcludeUIDs: []uint32{2, 1},
				ExcludeOutboundCIDRs: test.Prefixes("10.1.1.1/8", "10.1.1.1/7"), Addresses: test.Addrs("::ffff:10.0.0.1"),
			}, MeshConfig{
				ExcludeInboundPorts: []uint16{2, 1},
				Upstreams:           []Upstream{{Name: "b", Addresses: test.Addrs("10.0.0.2", "10.0.0.1")}, {Name: "a"}},
			}
	}
	request, meshConfig := make()
	Merge(request, meshConfig)
	wantRequest, wantOverlay := make()
	if diff := cmp.Diff(wantRequest, request, comparing()); diff != "" {
		t.Errorf("request (-before +after):\n%s", diff)
	}
	if diff := cmp.Diff(wantOverlay, meshConfig, comparing()); diff != "" {
		t.Errorf("mesh configuration (-before +after):\n%s", diff)
	}
}

// valid is a workload with something in every field.
func validWorkload() Workload {
	return Merge(Request{
		ProxyUID: 101, InboundPort: 20000, DNS: DNS{Port: 8600}, ExcludeInboundPorts: []uint16{1},
		ExcludeOutboundPorts: []uint16{2}, ExcludeOutboundCIDRs: test.Prefixes("10.0.0.0/8"), ExcludeUIDs: []uint32{3},
		Addresses: test.Addrs("10.9.1.2", "fd09::2"),
	}, MeshConfig{Upstreams: []Upstream{{Name: "db", Addresses: test.Addrs("240.0.0.5"), Listener: netip.MustParseAddrPort("127.0.0.1:9191")}},
		Proxies: []Sidecar{{Service: "api", InboundPort: 20001, OutboundPort: 15002, ServicePorts: []uint16{8080}, VirtualIPs: test.Addrs("240.0.0.6")}}})
}

// sidecar edits the workload's second proxy.
func sidecar(edit func(*Sidecar)) func(*Workload) {
	return func(w *Workload) {
		list := []Sidecar{w.Proxies[0]}
		edit(&list[0])
		w.Proxies = list
	}
}

func TestValidate(t *testing.T) {
	if err := validWorkload().Validate(); err != nil {
		t.Fatalf("a valid workload: %v", err)
	}
	upstream := func(edit func(*Upstream)) func(*Workload) {
		return func(w *Workload) {
			list := []Upstream{w.Upstreams[0]}
			edit(&list[0])
			w.Upstreams = list
		}
	}
	listener := func(text string) func(*Workload) {
		return upstream(func(u *Upstream) { u.Listener = netip.MustParseAddrPort(text) })
	}
	for _, tc := range []struct {
		field string // that the error must name
		edit  func(*Workload)
	}{
		{"mode", func(w *Workload) { w.Mode = "opaque" }},
		{"guard", func(w *Workload) { w.Guard = "maybe" }},
		{"egress guard", func(w *Workload) { w.Egress = "maybe" }},
		{"outbound port", func(w *Workload) { w.OutboundPort = 0 }},
		{"inbound port", func(w *Workload) { w.InboundPort = w.OutboundPort }},
		{"budget", func(w *Workload) { w.Budget = MaxBudget + 1 }},
		{"excluded CIDR", func(w *Workload) { w.ExcludeOutboundCIDRs = []netip.Prefix{{}} }},
		{"address", func(w *Workload) { w.Addresses = []netip.Addr{{}} }},
		{"address", func(w *Workload) { w.Addresses = test.Addrs("0.0.0.0") }},
		{"address", func(w *Workload) { w.Addresses = test.Addrs("::") }},
		{`upstream "db"`, listener("10.0.0.1:9191")},
		{`upstream "db"`, listener("127.0.0.1:0")},
		{`upstream "db"`, listener("127.200.0.1:9191")}, // the encoded range
		{`upstream "db"`, upstream(func(u *Upstream) { u.Listener = netip.AddrPort{} })},
		{`upstream "db"`, upstream(func(u *Upstream) { u.Addresses = []netip.Addr{{}} })},
		{"port 20000", sidecar(func(p *Sidecar) { p.InboundPort = 20000 })},
		{"port 15001", sidecar(func(p *Sidecar) { p.OutboundPort = 15001 })},
		{`proxy of "api"`, sidecar(func(p *Sidecar) { p.OutboundPort = 0 })},
		{`proxy of "api"`, sidecar(func(p *Sidecar) { p.InboundPort = 0 })},
		{`proxy of "api"`, sidecar(func(p *Sidecar) { p.VirtualIPs = test.Addrs("::") })},
		{"9 proxies", func(w *Workload) { w.Proxies = make([]Sidecar, MaxProxies) }},
	} {
		w := validWorkload()
		tc.edit(&w)
		if err := w.Validate(); err == nil || !strings.Contains(err.Error(), tc.field) {
			t.Errorf("%s: error %v, want one that names the field", tc.field, err)
		}
	}
	for name, edit := range map[string]func(*Workload){
		"inbound port not known": func(w *Workload) { w.InboundPort = 0 },
		"largest budget":         func(w *Workload) { w.Budget = MaxBudget },
		"no address":             func(w *Workload) { w.Addresses = nil },
		"listener on IPv6":       listener("[::1]:9191"),
		"upstream without VIP":   upstream(func(u *Upstream) { u.Addresses = nil }),
	} {
		w := validWorkload()
		edit(&w)
		if err := w.Validate(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Every field counts: one that Equal forgot would never reach the kernel.
func TestEqual(t *testing.T) {
	for name, edit := range map[string]func(*Workload){
		"mode":          func(w *Workload) { w.Mode = ModeDirect },
		"proxy UID":     func(w *Workload) { w.ProxyUID++ },
		"inbound port":  func(w *Workload) { w.InboundPort++ },
		"outbound port": func(w *Workload) { w.OutboundPort++ },
		"DNS":           func(w *Workload) { w.DNS.Port++ },
		"guard":         func(w *Workload) { w.Guard = GuardAudit },
		"egress guard":  func(w *Workload) { w.Egress = GuardAudit },
		"budget":        func(w *Workload) { w.Budget++ },
		"ports in":      func(w *Workload) { w.ExcludeInboundPorts = []uint16{9} },
		"ports out":     func(w *Workload) { w.ExcludeOutboundPorts = nil },
		"CIDRs":         func(w *Workload) { w.ExcludeOutboundCIDRs = test.Prefixes("10.0.0.0/9") },
		"UIDs":          func(w *Workload) { w.ExcludeUIDs = []uint32{3, 4} },
		"addresses":     func(w *Workload) { w.Addresses = test.Addrs("fd09::2", "10.9.1.2") },
		"no upstream":   func(w *Workload) { w.Upstreams = nil },
		"virtual IP":    func(w *Workload) { w.Upstreams = []Upstream{{Name: "db", Listener: w.Upstreams[0].Listener}} },
		"listener": func(w *Workload) {
			w.Upstreams = []Upstream{{Name: "db", Addresses: w.Upstreams[0].Addresses, Listener: netip.MustParseAddrPort("127.0.0.1:1")}}
		},
		"ephemeral ports": func(w *Workload) { w.Ephemeral.Last++ },
		"service":         func(w *Workload) { w.Service = "web" },
		"no sidecar":      func(w *Workload) { w.Proxies = nil },
		"seats":           func(w *Workload) { w.Seats = []uint8{1, 0} },
		"sidecar":         sidecar(func(p *Sidecar) { p.Service = "x" }),
		"sidecar's in":    sidecar(func(p *Sidecar) { p.InboundPort++ }),
		"sidecar's out":   sidecar(func(p *Sidecar) { p.OutboundPort++ }),
		"service port":    sidecar(func(p *Sidecar) { p.ServicePorts = nil }),
		"owned VIP":       sidecar(func(p *Sidecar) { p.VirtualIPs = nil }),
	} {
		w := validWorkload()
		edit(&w)
		if w.Equal(validWorkload()) {
			t.Errorf("%s: Equal sees no difference", name)
		}
	}
	if !validWorkload().Equal(validWorkload()) {
		t.Error("a workload is not equal to itself")
	}
}

// A guard that there is not must not come out as none.
func TestMergeKeepsAWrongGuardForValidate(t *testing.T) {
	if err := Merge(Request{Guard: GuardEnforce}, MeshConfig{Guard: "maybe"}).Validate(); err == nil {
		t.Error("a mesh configuration with a wrong guard passes")
	}
	if err := Merge(Request{Guard: "maybe"}, MeshConfig{Guard: GuardEnforce}).Validate(); err == nil {
		t.Error("a request with a wrong guard passes")
	}
}
