// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/envoy"
)

// The walk of a connection, on a real Envoy in each of two allocations: what
// a task in web dials, what both proxies see, and which verdicts rise. The
// proxy of web listens on 127.0.0.1 only, as Consul's does, so that native
// IPv6 has to find its way to it.
func TestConnection(t *testing.T) {
	mesh := newMesh(t)
	for _, c := range []struct {
		name   string
		socket string
		target netip.AddrPort
		peer   netip.AddrPort // what the task is told that it is connected to
		local  netip.Addr     // what the task is told that it is
		remote netip.Addr     // who web's proxy is dialled by
		source netip.Addr     // who web's proxy dials api from
	}{
		{
			name: "IPv4", socket: ipv4, target: netip.MustParseAddrPort("10.77.0.12:8080"),
			peer: netip.MustParseAddrPort("10.77.0.12:8080"), local: netip.MustParseAddr("10.77.0.11"),
			remote: netip.MustParseAddr("10.77.0.11"), source: netip.MustParseAddr("10.77.0.11"),
		},
		{
			name: "IPv4-mapped IPv6", socket: mapped, target: netip.MustParseAddrPort("10.77.0.12:8080"),
			peer: netip.MustParseAddrPort("[::ffff:10.77.0.12]:8080"), local: netip.MustParseAddr("::ffff:10.77.0.11"),
			remote: netip.MustParseAddr("10.77.0.11"), source: netip.MustParseAddr("10.77.0.11"),
		},
		{
			name: "IPv6", socket: ipv6, target: netip.MustParseAddrPort("[fd77::12]:8080"),
			peer: netip.MustParseAddrPort("[fd77::12]:8080"), local: netip.MustParseAddr("fd77::11"),
			// The proxy listens for IPv4 only: it is dialled from the task's IPv4 address.
			remote: netip.MustParseAddr("10.77.0.11"), source: netip.MustParseAddr("fd77::11"),
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := mesh.counts(t)
			got, err := mesh.dial(dialRequest{Socket: c.socket, Targets: []netip.AddrPort{c.target}})
			if err != nil {
				t.Fatal(err)
			}
			if got[0].Reply.Server != mesh.service.Name {
				t.Errorf("answered by %q, want %q", got[0].Reply.Server, mesh.service.Name)
			}
			if got[0].Peer != c.peer {
				t.Errorf("getpeername = %s, want %s", got[0].Peer, c.peer)
			}
			if got[0].Local.Addr() != c.local {
				t.Errorf("getsockname = %s, want the address %s", got[0].Local, c.local)
			}
			out := mesh.web.saw(t, 1)[0]
			if out.Listener != "outbound" || out.Local != c.target || out.Upstream != c.target.String() {
				t.Errorf("web's proxy saw %+v, want the outbound origin %s", out, c.target)
			}
			if want := netip.AddrPortFrom(c.remote, got[0].Local.Port()); out.Remote != want {
				t.Errorf("web's proxy saw the source %s, want the task's %s", out.Remote, want)
			}
			in := mesh.api.saw(t, 1)[0]
			if in.Listener != "inbound" || unmapped(in.Local) != c.target || unmapped(in.Remote).Addr() != c.source {
				t.Errorf("api's proxy saw %+v, want %s dialled from %s", in, c.target, c.source)
			}
			mesh.wantRise(t, before, counts{
				"web": {bpfmap.Redirected.String(): 1, bpfmap.Proxy.String(): 1},
				"api": {bpfmap.Inbound.String(): 1, bpfmap.Proxy.String(): 1},
			})
		})
	}

	t.Run("IPv6 only", func(t *testing.T) {
		before := mesh.counts(t)
		_, err := mesh.dial(dialRequest{Socket: v6only, Targets: []netip.AddrPort{netip.MustParseAddrPort("[fd77::12]:8080")}})
		if !errors.Is(err, syscall.ENETUNREACH) {
			t.Errorf("dial = %v, want ENETUNREACH", err)
		}
		mesh.wantRise(t, before, counts{"web": {bpfmap.RefusedFamily.String(): 1}, "api": {}})
	})
}

// Without its proxy an allocation is cut off, both ways and by name, although
// the service itself is there and listens on every address.
func TestProxyStopped(t *testing.T) {
	mesh := newMesh(t)
	target := netip.MustParseAddrPort("10.77.0.12:8080")
	request := dialRequest{Socket: ipv4, Targets: []netip.AddrPort{target}}

	mesh.web.stop(t)
	before := mesh.counts(t)
	if _, err := mesh.dial(request); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial without web's proxy = %v, want ECONNREFUSED", err)
	}
	mesh.wantRise(t, before, counts{
		"web": {bpfmap.RefusedNoProxy.String(): 1}, "api": {},
	})
	mesh.web.start(t)
	if _, err := mesh.dial(request); err != nil {
		t.Errorf("dial after web's proxy is back: %v", err)
	}

	// Another process shares the network and is under nobody's redirect.
	if _, err := test.Ask(mesh.outsider, "tcp4", target.String()); err != nil {
		t.Errorf("another process's dial through api's proxy: %v", err)
	}
	mesh.api.stop(t)
	before = mesh.counts(t)
	if _, err := test.Ask(mesh.outsider, "tcp4", target.String()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("another process's dial without api's proxy = %v, want ECONNREFUSED", err)
	}
	mesh.wantRise(t, before, counts{"web": {}, "api": {bpfmap.RefusedInboundNoProxy.String(): 1}})
	mesh.api.start(t)
	if _, err := mesh.dial(request); err != nil {
		t.Errorf("dial after api's proxy is back: %v", err)
	}
}

// A thousand connections at a time over several addresses and ports: each
// proxy saw every one as what was dialled.
func TestManyConnections(t *testing.T) {
	mesh := newMesh(t)
	var targets []netip.AddrPort
	for i := range test.Scale(1000) {
		address := netip.AddrFrom4([4]byte{10, 77, 0, byte(12 + i%3)})
		targets = append(targets, netip.AddrPortFrom(address, uint16(8080+i%7)))
	}
	before := mesh.counts(t)
	list, err := mesh.dial(dialRequest{Socket: ipv4, Targets: targets, Workers: 32})
	if err != nil {
		t.Fatal(err)
	}
	wrong := 0
	ways := newWays(mesh.web.saw(t, len(targets)), mesh.api.saw(t, len(targets)))
	for _, e := range list {
		if e.Peer != e.Target || e.Reply.Server != mesh.service.Name || !ways.have(e) {
			wrong++
			t.Logf("wrong: %+v", e)
		}
	}
	if wrong > 0 {
		t.Errorf("%d of %d connections are wrong", wrong, len(targets))
	}
	count := uint64(len(targets))
	mesh.wantRise(t, before, counts{
		"web": {bpfmap.Redirected.String(): count, bpfmap.Proxy.String(): count},
		"api": {bpfmap.Inbound.String(): count, bpfmap.Proxy.String(): count},
	})
}

// An explicit upstream by its virtual IP takes the filter chain that is for
// it, on any port, and never leaves as an address that nobody has.
func TestVirtualIP(t *testing.T) {
	mesh := newMesh(t)
	service := netip.MustParseAddrPort("10.77.0.12:8080")
	mesh.web.stop(t)
	mesh.web.spec.Config.Routes = []envoy.Route{
		{Name: "api", Prefix: netip.MustParsePrefix("240.0.0.1/32"), Address: service},
	}
	mesh.web.start(t)
	for _, virtual := range []string{"240.0.0.1:80", "240.0.0.1:8443"} {
		target := netip.MustParseAddrPort(virtual)
		got, err := mesh.dial(dialRequest{Socket: ipv4, Targets: []netip.AddrPort{target}})
		if err != nil {
			t.Fatal(err)
		}
		if got[0].Peer != target || got[0].Reply.Server != mesh.service.Name {
			t.Errorf("dialled %s: peer %s, answered by %q", target, got[0].Peer, got[0].Reply.Server)
		}
		out := mesh.web.saw(t, 1)[0]
		if out.Local != target || out.Cluster != "api" || out.Upstream != service.String() {
			t.Errorf("dialled %s: web's proxy saw %+v, want it sent on to %s", target, out, service)
		}
		if in := mesh.api.saw(t, 1)[0]; unmapped(in.Local) != service {
			t.Errorf("dialled %s: api's proxy saw %+v, want %s", target, in, service)
		}
	}
}
