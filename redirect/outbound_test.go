// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// answered fails the test unless the proxy answered, with the origin that was
// dialled, and both sides saw the addresses that they should.
func (a *alloc) answered(answer test.Answer, err error, origin netip.AddrPort, source netip.Addr) {
	t := a.node.t
	t.Helper()
	if err != nil {
		t.Fatalf("dial %s: %v", origin, err)
	}
	if answer.Server != a.outbound.Name {
		t.Errorf("dial %s: %s answered, want the proxy %s", origin, answer.Server, a.outbound.Name)
	}
	if answer.Origin != origin {
		t.Errorf("dial %s: the proxy saw origin %s", origin, answer.Origin)
	}
	if answer.To != origin {
		t.Errorf("dial %s: getpeername says %s", origin, answer.To)
	}
	own := source
	if origin.Addr().Is6() && source == a.v4 && a.v6.IsValid() {
		own = a.v6 // the proxy is on IPv4; the application sees the family that it dialled
	}
	if answer.From != netip.AddrPortFrom(own, answer.Peer.Port()) || answer.Peer.Addr() != source {
		t.Errorf("dial %s: getsockname says %s, the proxy saw %s, want %s and %s", origin, answer.From, answer.Peer, own, source)
	}
}

func TestOutbound(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	for _, origin := range []string{"10.9.1.1:80", "240.0.0.1:8080", "8.8.8.8:15001", "192.0.2.77:20000"} {
		moved := a.rose(func() {
			answer, err := a.ask("tcp4", origin)
			a.answered(answer, err, netip.MustParseAddrPort(origin), a.v4)
		})
		if diff := cmp.Diff(map[bpfmap.Verdict]uint64{bpfmap.Redirected: 1}, moved); diff != "" {
			t.Errorf("dial %s: verdicts (-want +got):\n%s", origin, diff)
		}
	}
}

func TestOutboundIPv6ToIPv4Proxy(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	origin := netip.AddrPortFrom(remote6(1), 80)
	answer, err := a.ask("tcp", origin.String())
	a.answered(answer, err, origin, a.v4)
}

func TestOutboundRefusedWithoutProxy(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	// Something listens on the very port that is dialled, and on the remote.
	a.serve(taskUID, a.taskCg, "tcp4", "0.0.0.0:8080")
	test.Echo(t, n.remote, "tcp", "0.0.0.0:8080")
	moved := a.rose(func() {
		if _, err := a.ask("tcp4", "10.9.1.1:8080"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial without a proxy: %v, want connection refused", err)
		}
	})
	if diff := cmp.Diff(map[bpfmap.Verdict]uint64{bpfmap.RefusedNoProxy: 1}, moved); diff != "" {
		t.Errorf("verdicts (-want +got):\n%s", diff)
	}
}

// Loopback and the workload's own addresses are not the mesh's business.
func TestOutboundStaysLocal(t *testing.T) {
	a := proxiedAlloc(t)
	app := a.serve(taskUID, a.taskCg, "tcp", "[::]:9000")
	const dualStack, ipv4 = "tcp", "tcp4"
	for _, tc := range []struct{ network, dial, arrives string }{
		{ipv4, "127.0.0.1", "127.0.0.1"},
		{ipv4, "127.0.0.2", "127.0.0.2"},
		{ipv4, "127.127.255.255", "127.127.255.255"}, // the last one before the encoded range
		{ipv4, "0.0.0.0", "127.0.0.1"},
		{ipv4, a.v4.String(), a.v4.String()},
		{dualStack, "::1", "::1"},
		{dualStack, "::", "::1"},
		{dualStack, a.v6.String(), a.v6.String()},
		{dualStack, "::ffff:127.0.0.1", "127.0.0.1"},
		{dualStack, "::ffff:" + a.v4.String(), a.v4.String()},
		{"tcp6", "::1", "::1"},
	} {
		t.Run(tc.network+" "+tc.dial, func(t *testing.T) {
			domain := unix.AF_INET6
			if tc.network == ipv4 {
				domain = unix.AF_INET
			}
			p := a.task(t)
			a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.Local: 1}, func() {
				s := stream(domain)
				if tc.network == "tcp6" {
					s = s.set(unix.SOL_IPV6, unix.IPV6_V6ONLY, 1)
				}
				got := p.last(t, s.connect(addrPort(netip.MustParseAddr(tc.dial), 9000)).ask(""))
				direct(t, got.Answer, app.Name, netip.AddrPortFrom(netip.MustParseAddr(tc.arrives), 9000))
			})
		})
	}
}

// An explicit upstream has a listener of the proxy for itself, which its
// virtual IP leads to, whatever the port.
func TestOutboundUpstream(t *testing.T) {
	a := proxiedAlloc(t)
	listener4 := a.serve(proxyUID, a.proxyCg, "tcp4", "127.0.0.1:9191")
	listener6 := a.serve(proxyUID, a.proxyCg, "tcp6", "[::1]:9192")
	meshConfig := workload.MeshConfig{Upstreams: []workload.Upstream{
		{Name: "db", Addresses: []netip.Addr{netip.MustParseAddr("240.0.0.5"), netip.MustParseAddr("fd00:1::5")}, Listener: listener4.Addr},
		{Name: "cache", Addresses: []netip.Addr{netip.MustParseAddr("240.0.0.6"), netip.MustParseAddr("fd00:1::6")}, Listener: listener6.Addr},
	}}
	if err := a.node.SetMeshConfig(a.key, meshConfig); err != nil {
		t.Fatal(err)
	}
	p := a.task(t)
	for _, tc := range []struct {
		name     string
		script   script
		listener *test.ServerProcess
	}{
		{"IPv4", stream(unix.AF_INET).connect("240.0.0.5:5432"), listener4},
		{"another port", stream(unix.AF_INET).connect("240.0.0.5:80"), listener4},
		{"non-blocking", stream(unix.AF_INET).to("connectLater", "240.0.0.5:80"), listener4},
		{"IPv4-mapped", stream(unix.AF_INET6).connect("[::ffff:240.0.0.5]:80"), listener4},
		{"IPv6 to a listener on IPv4", stream(unix.AF_INET6).connect("[fd00:1::5]:80"), listener4},
		{"IPv6", stream(unix.AF_INET6).connect("[fd00:1::6]:80"), listener6},
		{"IPv4-mapped to a listener on IPv6", stream(unix.AF_INET6).connect("[::ffff:240.0.0.6]:80"), listener6},
		{"MPTCP", script(nil).open(unix.AF_INET, unix.IPPROTO_MPTCP).connect("240.0.0.5:80"), listener4},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dialled := unmapped(tc.script[len(tc.script)-1].Addr)
			a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.ToUpstream: 1}, func() {
				got := p.last(t, tc.script.ask("")).Answer
				if got.Server != tc.listener.Name || got.Local != tc.listener.Addr {
					t.Errorf("%s answered on %s, want %s", got.Server, got.Local, tc.listener.Name)
				}
				if got.To != dialled {
					t.Errorf("getpeername = %s, want %s", got.To, dialled)
				}
				if got.Peer != got.From || !got.From.Addr().IsLoopback() {
					t.Errorf("getsockname = %s, the proxy saw %s; want a loopback address", got.From, got.Peer)
				}
			})
		})
	}
	t.Run("localhost", func(t *testing.T) {
		a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.Local: 1}, func() {
			got := p.last(t, stream(unix.AF_INET).connect(listener4.Addr.String()).ask(""))
			direct(t, got.Answer, listener4.Name, listener4.Addr)
		})
	})
	t.Run("localhost by the socket of an upstream", func(t *testing.T) {
		a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.ToUpstream: 1, bpfmap.Local: 1}, func() {
			got := p.last(t, stream(unix.AF_INET).connect("240.0.0.5:80").ask("").disconnect().connect(listener4.Addr.String()).ask(""))
			direct(t, got.Answer, listener4.Name, listener4.Addr)
		})
	})
	t.Run("redirected and localhost by the socket of an upstream", func(t *testing.T) {
		a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.ToUpstream: 1, bpfmap.Redirected: 1, bpfmap.Local: 1}, func() {
			got := p.run(t, stream(unix.AF_INET).connect("240.0.0.5:80").ask("").
				disconnect().connect(somewhere).ask("").
				disconnect().connect(listener4.Addr.String()).ask(""))
			a.answered(got[5].Answer, nil, netip.MustParseAddrPort(somewhere), a.v4)
			direct(t, got[8].Answer, listener4.Name, listener4.Addr)
		})
	})
	t.Run("bound to lo", func(t *testing.T) {
		a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.ToUpstream: 1}, func() {
			got := p.last(t, stream(unix.AF_INET).device("lo").connect("240.0.0.5:80").ask("")).Answer
			if got.Server != listener4.Name || got.To.String() != "240.0.0.5:80" {
				t.Errorf("%s answered as %s, want %s", got.Server, got.To, listener4.Name)
			}
		})
	})
	t.Run("connected already", func(t *testing.T) {
		a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.ToUpstream: 1}, func() {
			got := p.last(t, stream(unix.AF_INET).connect("240.0.0.5:80").connect(somewhere).fails(unix.EISCONN).ask("")).Answer
			if got.To.String() != "240.0.0.5:80" {
				t.Errorf("getpeername = %s, want what was dialled first", got.To)
			}
		})
	})
	t.Run("neighbour of a virtual IP", func(t *testing.T) {
		a.proxied(t, p, stream(unix.AF_INET).connect("240.0.0.7:80").ask(""), "240.0.0.7:80", a.v4)
	})
	// Sockets that cannot be sent where the listener is.
	for name, s := range map[string]script{
		"IPv4 to a listener on IPv6":      stream(unix.AF_INET).connect("240.0.0.6:80"),
		"V6ONLY to a listener on IPv4":    stream(unix.AF_INET6).set(unix.SOL_IPV6, unix.IPV6_V6ONLY, 1).connect("[fd00:1::5]:80"),
		"bound to IPv6, listener on IPv4": stream(unix.AF_INET6).bind("[" + a.v6.String() + "]:0").connect("[fd00:1::5]:80"),
	} {
		t.Run(name, func(t *testing.T) {
			a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedFamily: 1}, func() { p.run(t, s.fails(unix.ENETUNREACH)) })
		})
	}
	t.Run("bound to a device", func(t *testing.T) {
		a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedDevice: 1}, func() {
			p.run(t, stream(unix.AF_INET).device("eth0").connect("240.0.0.5:80").fails(unix.ENETUNREACH))
		})
	})
}

// The name of an upstream stays in a socket that is redirected next, where it shows
// nothing: a redirect has nothing to take away. A direct connect takes it away.
func TestOutboundKeepsWhatARedirectDoesNotShow(t *testing.T) {
	a := proxiedAlloc(t)
	listener := a.serve(proxyUID, a.proxyCg, "tcp4", "127.0.0.1:9191")
	err := a.node.SetMeshConfig(a.key, workload.MeshConfig{Upstreams: []workload.Upstream{
		{Name: "db", Addresses: []netip.Addr{netip.MustParseAddr("240.0.0.5")}, Listener: listener.Addr},
	}})
	if err != nil {
		t.Fatal(err)
	}
	tables, err := bpfmap.OpenTablesToRead(a.node.Paths().Maps())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tables.Close() })
	dials, err := tables.Table("dials")
	if err != nil {
		t.Fatal(err)
	}
	host := &socketHost{}
	a.Do(func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			t.Error(err)
			return
		}
		defer unix.Close(fd)
		for _, tc := range []struct {
			addr string
			row  bool
		}{{"240.0.0.5:80", true}, {somewhere, true}, {listener.Addr.String(), false}, {somewhere, false}} {
			to := netip.MustParseAddrPort(tc.addr)
			if err := unix.Connect(fd, sockaddr(fd, to)); err != nil {
				t.Errorf("connect %s: %v", to, err)
				return
			}
			if peer, err := host.socketName(fd, true); err != nil || peer != to {
				t.Errorf("getpeername = %s, %v; want %s", peer, err, to)
			}
			var row bpfmap.BpfDialled
			err := dials.Lookup(int32(fd), &row)
			if got := !errors.Is(err, ebpf.ErrKeyNotExist); got != tc.row || got && err != nil {
				t.Errorf("connected to %s: socket has a row: %t (%v), want %t", to, got, err, tc.row)
			}
			if err := host.disconnect(fd); err != nil {
				t.Errorf("disconnect: %v", err)
			}
		}
	})
}

func unmapped(addr netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
}
