// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"net/netip"
	"os"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// verdictsAre fails the test unless exactly these counters moved. What lets a
// connection in may count once more than it was dialled: sk_lookup also sees a
// late packet of a connection that has just ended, and a SYN may be sent again.
func verdictsAre(t *testing.T, moved, want map[bpfmap.Verdict]uint64) {
	t.Helper()
	for _, verdict := range []bpfmap.Verdict{bpfmap.Inbound, bpfmap.InboundExcluded, bpfmap.GuardAudited, bpfmap.Forwarded} {
		if want[verdict] > 0 {
			moved[verdict] = min(moved[verdict], want[verdict])
		}
	}
	if diff := cmp.Diff(want, moved); diff != "" {
		t.Errorf("verdicts (-want +got):\n%s", diff)
	}
}

// fromOutside dials the allocation from the remote host.
func (a *alloc) fromOutside(addr netip.Addr, port uint16) (test.Answer, error) {
	a.node.t.Helper()
	network := "tcp4"
	if addr.Is6() {
		network = "tcp6"
	}
	return test.Ask(a.node.remote, network, addrPort(addr, port))
}

// arrives fails the test unless a connection from outside is answered by server, which
// sees it as it was dialled.
func (a *alloc) arrives(addr netip.Addr, port uint16, server string, toProxy bool) {
	t := a.node.t
	t.Helper()
	dialled := netip.AddrPortFrom(addr, port)
	answer, err := a.fromOutside(addr, port)
	if err != nil {
		t.Errorf("dial %s from outside: %v", dialled, err)
		return
	}
	if answer.Server != server {
		t.Errorf("dial %s from outside: %q answered, want %q", dialled, answer.Server, server)
	}
	if answer.Local != dialled {
		t.Errorf("dial %s from outside: getsockname of the accepted socket says %s", dialled, answer.Local)
	}
	if answer.Peer != answer.From {
		t.Errorf("dial %s from outside: the server saw %s, the dialler is %s", dialled, answer.Peer, answer.From)
	}
	want := netip.AddrPort{}
	if toProxy {
		want = dialled
	}
	if answer.Origin != want {
		t.Errorf("dial %s from outside: SO_ORIGINAL_DST says %s, want %s", dialled, answer.Origin, want)
	}
}

// refused fails the test unless a connection from outside is refused at once.
func (a *alloc) refused(addr netip.Addr, port uint16) {
	t := a.node.t
	t.Helper()
	if answer, err := a.fromOutside(addr, port); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial %s from outside: %q answered, error %v, want connection refused", addrPort(addr, port), answer.Server, err)
	}
}

func TestInbound(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) { r.ExcludeInboundPorts = []uint16{9000, 9001} })
	a.outbound = a.serve(proxyUID, a.proxyCg, "tcp4", "127.0.0.1:15001")
	a.inbound = a.serve(proxyUID, a.proxyCg, "tcp", "[::]:20000")
	app := a.serve(taskUID, a.taskCg, "tcp", "[::]:8080")
	excluded := a.serve(taskUID, a.taskCg, "tcp", "[::]:9000")
	for _, addr := range []netip.Addr{a.v4, a.v6} {
		// What the application listens on, what nobody does, the proxy's own ports.
		for _, port := range []uint16{8080, 1, 65535, 20000, 15001, 22} {
			verdictsAre(t, a.rose(func() { a.arrives(addr, port, a.inbound.Name, true) }), map[bpfmap.Verdict]uint64{bpfmap.Inbound: 1})
		}
		verdictsAre(t, a.rose(func() { a.arrives(addr, 9000, excluded.Name, false) }), map[bpfmap.Verdict]uint64{bpfmap.InboundExcluded: 1})
		// An excluded port without an application is the kernel's to refuse.
		verdictsAre(t, a.rose(func() { a.refused(addr, 9001) }), map[bpfmap.Verdict]uint64{bpfmap.InboundExcluded: 1})
	}
	for _, addr := range []netip.Addr{a.v4, a.v6, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.9"), netip.IPv6Loopback()} {
		moved := a.rose(func() {
			answer, err := a.ask("tcp", addrPort(addr, 8080))
			if err != nil || answer.Server != app.Name || answer.Origin.IsValid() {
				t.Errorf("a task dials %s: answer %+v, error %v, want %s", addrPort(addr, 8080), answer, err, app.Name)
			}
		})
		verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.Local: 1})
		moved = a.rose(func() {
			answer, err := a.askAs(proxyUID, a.proxyCg, "tcp", addrPort(addr, 8080))
			if err != nil || answer.Server != app.Name {
				t.Errorf("the proxy dials %s: answer %+v, error %v, want %s", addrPort(addr, 8080), answer, err, app.Name)
			}
		})
		verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.Proxy: 1})
	}
}

func TestInboundRefusedWithoutProxy(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.serve(taskUID, a.taskCg, "tcp", "[::]:8080")
	for _, addr := range []netip.Addr{a.v4, a.v6} {
		for _, port := range []uint16{8080, 20000} {
			verdictsAre(t, a.rose(func() { a.refused(addr, port) }), map[bpfmap.Verdict]uint64{bpfmap.RefusedInboundNoProxy: 1})
		}
	}
	// Down after it was up.
	inbound := a.serve(proxyUID, a.proxyCg, "tcp", "[::]:20000")
	a.arrives(a.v4, 8080, inbound.Name, true)
	inbound.Stop()
	verdictsAre(t, a.rose(func() { a.refused(a.v4, 8080) }), map[bpfmap.Verdict]uint64{bpfmap.RefusedInboundNoProxy: 1})
	verdictsAre(t, a.rose(func() { a.refused(a.v6, 8080) }), map[bpfmap.Verdict]uint64{bpfmap.RefusedInboundNoProxy: 1})
}

func TestInboundIPv6ToIPv4Proxy(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy() // 0.0.0.0 only
	a.serve(taskUID, a.taskCg, "tcp", "[::]:8080")
	a.arrives(a.v4, 8080, a.inbound.Name, true)
	verdictsAre(t, a.rose(func() { a.refused(a.v6, 8080) }), map[bpfmap.Verdict]uint64{bpfmap.RefusedInboundNoProxy: 1})
}

// A listener for IPv6 only must not swallow IPv4, and not open it to the application.
func TestInboundIPv4ToIPv6OnlyProxy(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.serve(taskUID, a.taskCg, "tcp", "[::]:8080")
	six := a.serve(proxyUID, a.proxyCg, "tcp6", "[::]:20000")
	a.arrives(a.v6, 8080, six.Name, true)
	verdictsAre(t, a.rose(func() { a.refused(a.v4, 8080) }), map[bpfmap.Verdict]uint64{bpfmap.RefusedInboundNoProxy: 1})
	// One for each family side by side.
	four := a.serve(proxyUID, a.proxyCg, "tcp4", "0.0.0.0:20000")
	a.arrives(a.v6, 8080, six.Name, true)
	a.arrives(a.v4, 8080, four.Name, true)
}

// A listener on one address takes what was dialled to any.
func TestInboundListenerOnOneAddress(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	for _, addr := range []string{addrPort(a.v4, 20000), "127.0.0.1:20000"} {
		inbound := a.serve(proxyUID, a.proxyCg, "tcp4", addr)
		a.arrives(a.v4, 8080, inbound.Name, true)
		a.arrives(a.v4, 20000, inbound.Name, true)
		inbound.Stop()
	}
}

func TestInboundPortUnknown(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) { r.InboundPort, r.ExcludeInboundPorts = 0, []uint16{9000} })
	a.outbound = a.serve(proxyUID, a.proxyCg, "tcp4", "127.0.0.1:15001")
	a.serve(taskUID, a.taskCg, "tcp", "[::]:8080")
	excluded := a.serve(taskUID, a.taskCg, "tcp", "[::]:9000")
	origin := netip.AddrPortFrom(remote4(1), 80)
	answer, err := a.ask("tcp4", origin.String())
	a.answered(answer, err, origin, a.v4)
	// Envoy opens its port before Consul's news comes.
	early := a.serve(proxyUID, a.proxyCg, "tcp", "[::]:21000")
	for _, addr := range []netip.Addr{a.v4, a.v6} {
		for _, port := range []uint16{8080, 21000, 1} {
			verdictsAre(t, a.rose(func() { a.refused(addr, port) }), map[bpfmap.Verdict]uint64{bpfmap.RefusedInboundUnknown: 1})
		}
		a.arrives(addr, 9000, excluded.Name, false)
	}
	if err := n.SetMeshConfig(a.key, workload.MeshConfig{InboundPort: 21000}); err != nil {
		t.Fatal(err)
	}
	for _, addr := range []netip.Addr{a.v4, a.v6} {
		verdictsAre(t, a.rose(func() { a.arrives(addr, 8080, early.Name, true) }), map[bpfmap.Verdict]uint64{bpfmap.Inbound: 1})
		a.arrives(addr, 9000, excluded.Name, false)
	}
	// The same port opened again is seen by the kernel itself.
	early.Stop()
	verdictsAre(t, a.rose(func() { a.refused(a.v4, 8080) }), map[bpfmap.Verdict]uint64{bpfmap.RefusedInboundNoProxy: 1})
	late := a.serve(proxyUID, a.proxyCg, "tcp", "[::]:21000")
	a.arrives(a.v4, 8080, late.Name, true)
	a.arrives(a.v6, 8080, late.Name, true)
	// And a port that Consul moves.
	moved := a.serve(proxyUID, a.proxyCg, "tcp", "[::]:22000")
	if err := n.SetMeshConfig(a.key, workload.MeshConfig{InboundPort: 22000, ExcludeInboundPorts: []uint16{8080}}); err != nil {
		t.Fatal(err)
	}
	a.arrives(a.v4, 8081, moved.Name, true)
	a.arrives(a.v6, 8081, moved.Name, true)
}

// The encoded range means something on lo alone: from outside it would bring the
// proxy a connection with somebody's origin.
func TestInboundEncodedRangeFromOutside(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) { r.ExcludeInboundPorts = []uint16{9000} })
	a.outbound = a.serve(proxyUID, a.proxyCg, "tcp", "[::]:15001")
	a.inbound = a.serve(proxyUID, a.proxyCg, "tcp", "[::]:20000")
	a.serve(taskUID, a.taskCg, "tcp", "[::]:9000")
	for _, origin := range []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:80"), netip.AddrPortFrom(remote6(1), 80)} {
		answer, err := a.ask("tcp", origin.String())
		source := a.v4
		if origin.Addr().Is6() {
			source = a.v6
		}
		a.answered(answer, err, origin, source)
	}
	a.Do(func() { setSysctl(t, "net/ipv4/conf/all/route_localnet", "1") })
	n.remote.Do(func() { setSysctl(t, "net/ipv4/conf/all/route_localnet", "1") })
	four, six := workload.EncodedAddrs(1)
	n.remote.Do(func() {
		addRoute(t, workload.EncodedPrefix4, a.v4)
		addRoute(t, workload.EncodedPrefix6, a.v6)
	})
	for _, addr := range []netip.Addr{four, six} {
		for _, port := range []uint16{80, 9000, 20000} {
			verdictsAre(t, a.rose(func() { a.refused(addr, port) }), map[bpfmap.Verdict]uint64{bpfmap.RefusedEncoded: 1})
		}
	}
}

// addRoute adds a route in the calling thread's namespace.
func addRoute(t *testing.T, prefix netip.Prefix, via netip.Addr) {
	t.Helper()
	if err := netlink.RouteAdd(&netlink.Route{Dst: host.IPNet(prefix), Gw: via.AsSlice()}); err != nil {
		t.Fatalf("add route %s: %v", prefix, err)
	}
}

func setSysctl(t *testing.T, name, value string) {
	t.Helper()
	// The thread's own view: /proc/sys/net follows the namespace of the thread that opens it.
	if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil {
		t.Fatalf("set %s: %v", name, err)
	}
}

// For a task there was no redirect, so there is no original destination.
func TestInboundOriginalDestinationIsForTheProxy(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) { r.ExcludeInboundPorts = []uint16{9000} })
	a.inbound = a.serve(proxyUID, a.proxyCg, "tcp", "[::]:20000")
	task := a.serve(taskUID, a.taskCg, "tcp", "[::]:9000")
	for _, addr := range []netip.Addr{a.v4, a.v6} {
		a.arrives(addr, 9000, task.Name, false)
		a.arrives(addr, 9001, a.inbound.Name, true)
	}
}
