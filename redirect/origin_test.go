// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// twins are allocations that the kernel cannot tell apart by any address: each
// is alone in its network, under the same addresses.
func (n *node) twins(t *testing.T, keys ...string) (list []*alloc) {
	t.Helper()
	v4, v6 := netip.MustParseAddr("10.8.0.2"), netip.MustParseAddr("fd08::2")
	for _, key := range keys {
		a := &alloc{
			NetNS: test.NewNetNS(t), node: n, v4: v4, v6: v6, key: workload.AttachmentID{ContainerID: key, IfName: "eth0"},
			proxyCg: test.NewCgroup(t), taskCg: test.NewCgroup(t), taskCache: make(map[test.Spec]*test.Client),
		}
		test.Veth(t,
			test.VethEnd{NetNS: a.NetNS, Addrs: []netip.Prefix{netip.PrefixFrom(v4, 24), netip.PrefixFrom(v6, 64)}},
			test.VethEnd{NetNS: test.NewNetNS(t)})
		list = append(list, a)
	}
	return list
}

// origins is how many addresses the allocation holds, as the node tells.
func (a *alloc) origins(t *testing.T) int {
	t.Helper()
	list, err := a.node.Workloads()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(list, func(w inspect.WorkloadStatus) bool { return w.Key == a.key })
	if i < 0 {
		t.Fatalf("workload %s is not on the list", a.key)
	}
	return int(list[i].Origins)
}

// runLoad starts the loads at once, one in each allocation, and waits for all.
func runLoad(t *testing.T, loads map[*alloc]load) map[*alloc]loadResult {
	t.Helper()
	type done struct {
		a      *alloc
		result loadResult
		err    error
	}
	finished := make(chan done)
	for a, l := range loads {
		p := a.loadTask(t)
		go func() {
			d := done{a: a}
			d.err = p.Call(l, &d.result)
			finished <- d
		}()
	}
	results := make(map[*alloc]loadResult)
	for range loads {
		d := <-finished
		if d.err != nil {
			t.Fatalf("run load in %s: %v", d.a.key, d.err)
		}
		results[d.a] = d.result
	}
	return results
}

func TestOriginOfManyConnections(t *testing.T) {
	n := newNode(t)
	twins := n.twins(t, "one", "two")
	connections, destinations := test.Scale(200_000)/len(twins), test.Scale(10_000)
	loads := make(map[*alloc]load)
	for i, a := range twins {
		a.add()
		a.startLoadProxy(t, uint64(i+1))
		loads[a] = load{
			Proxy: uint64(i + 1), Connections: connections, Destinations: destinations,
			Ports: 20, Workers: 8, Source: a.v4, Source6: a.v6,
		}
	}
	for a, got := range runLoad(t, loads) {
		if diff := cmp.Diff(loadResult{Good: connections}, got); diff != "" {
			t.Errorf("connections of %s (-want +got):\n%s", a.key, diff)
		}
		want := map[bpfmap.Verdict]uint64{bpfmap.Redirected: uint64(connections), bpfmap.Listener: 1}
		if diff := cmp.Diff(want, a.counts()); diff != "" {
			t.Errorf("verdicts of %s (-want +got):\n%s", a.key, diff)
		}
		if got := a.origins(t); got != destinations {
			t.Errorf("%s holds %d addresses, dialled %d", a.key, got, destinations)
		}
	}
}

// A task that dials all the world comes to the end of its budget, and nobody
// else does.
func TestOriginBudget(t *testing.T) {
	n := newNode(t)
	twins := n.twins(t, "hostile", "neighbour")
	hostile, neighbour := twins[0], twins[1]
	budget, peaceful := test.Scale(10_000), test.Scale(5_000)
	const workers = 4
	hostile.add(func(r *workload.Request) { r.Budget = uint32(budget) })
	neighbour.add()
	for i, a := range twins {
		a.startLoadProxy(t, uint64(i+1))
	}
	flood := load{Proxy: 1, Connections: 2 * budget, Destinations: 2 * budget, Ports: 1, Workers: workers, Source: hostile.v4, Source6: hostile.v6}
	results := runLoad(t, map[*alloc]load{
		hostile:   flood,
		neighbour: {Proxy: 2, Connections: peaceful, Destinations: peaceful, Ports: 1, Workers: workers, Source: neighbour.v4, Source6: neighbour.v6},
	})
	if diff := cmp.Diff(loadResult{Good: peaceful}, results[neighbour]); diff != "" {
		t.Errorf("connections of the neighbour (-want +got):\n%s", diff)
	}
	// Each worker may pass the test of the budget before another's entry counts.
	got := results[hostile]
	if got.Good < budget || got.Good >= budget+workers || got.Refused != flood.Connections-got.Good {
		t.Errorf("of %d connections %d were good and %d refused, with a budget of %d: %+v",
			flood.Connections, got.Good, got.Refused, budget, got)
	}
	if held := hostile.origins(t); held != got.Good {
		t.Errorf("the hostile task holds %d addresses, reached %d", held, got.Good)
	}
	want := map[bpfmap.Verdict]uint64{bpfmap.Redirected: uint64(got.Good), bpfmap.RefusedBudget: uint64(got.Refused), bpfmap.Listener: 1}
	if diff := cmp.Diff(want, hostile.counts()); diff != "" {
		t.Errorf("verdicts of the hostile task (-want +got):\n%s", diff)
	}
	// What it holds it may dial again; the rest stays refused.
	if again := runLoad(t, map[*alloc]load{hostile: flood})[hostile]; again != got {
		t.Errorf("the same again: %+v, before %+v", again, got)
	}
}

func TestOriginOnAThousandPorts(t *testing.T) {
	a := newNode(t).newAlloc()
	a.add()
	a.startLoadProxy(t, 7)
	ports := test.Scale(1000)
	scan := load{Proxy: 7, Connections: ports, Destinations: 1, Ports: ports, Workers: 4, Source: a.v4, Source6: a.v6}
	if diff := cmp.Diff(loadResult{Good: ports}, runLoad(t, map[*alloc]load{a: scan})[a]); diff != "" {
		t.Errorf("connections (-want +got):\n%s", diff)
	}
	if got := a.origins(t); got != 1 {
		t.Errorf("%d ports of one address take %d entries, want 1", ports, got)
	}
}

// What the kernel's own table of sockets says is the encoding that this package
// knows: the first index, the origin's port.
func TestOriginIsTheAddress(t *testing.T) {
	v4, v6 := workload.EncodedAddrs(bpfmap.IndexFirst)
	for _, tc := range []struct {
		listener, origin string
		family           uint8
		want             netip.Addr
	}{
		{"127.0.0.1:15001", somewhere, unix.AF_INET, v4},
		{"[::1]:15001", "[2001:db8::1]:8080", unix.AF_INET6, v6},
	} {
		t.Run(tc.listener, func(t *testing.T) {
			a := newNode(t).newAlloc()
			a.add()
			a.serve(proxyUID, a.proxyCg, "tcp", tc.listener)
			a.task(t).run(t, stream(int(tc.family)).connect(tc.origin).ask(""))
			var sockets []*netlink.Socket
			var err error
			a.Do(func() { sockets, err = netlink.SocketDiagTCP(tc.family) })
			if err != nil {
				t.Fatal(err)
			}
			var peers []string
			for _, s := range sockets {
				if peer, _ := netip.AddrFromSlice(s.ID.Destination); s.ID.DestinationPort == 8080 {
					peers = append(peers, addrPort(peer.Unmap(), s.ID.DestinationPort))
				}
			}
			if diff := cmp.Diff([]string{addrPort(tc.want, 8080)}, peers); diff != "" {
				t.Errorf("peers of the task's sockets (-want +got):\n%s", diff)
			}
		})
	}
}

// The range that carries origins is not for tasks, whatever the port, and
// whether an index is in use or not.
func TestOriginRangeIsRefused(t *testing.T) {
	a := proxiedAlloc(t)
	p := a.task(t)
	a.proxied(t, p, stream(unix.AF_INET).connect(somewhere).ask(""), somewhere, a.v4) // index 1
	for _, port := range []uint16{80, 8080, outboundPort, inboundPort} {
		for _, text := range []string{
			"127.128.0.0", "127.128.0.1", "127.128.0.2", "127.200.3.4", "127.255.255.255",
			"::ffff:127.128.0.1", "fd77:6569:7200::", "fd77:6569:7200::1", "fd77:6569:7200::ffff:ffff",
		} {
			addr := netip.MustParseAddr(text)
			domain := unix.AF_INET6
			if addr.Is4() {
				domain = unix.AF_INET
			}
			a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedEncoded: 1}, func() {
				p.run(t, stream(domain).connect(addrPort(addr, port)).fails(unix.ECONNREFUSED))
			})
		}
	}
	// The proxy has no business there either.
	proxy := a.actor(t, proxyUID, a.proxyCg)
	a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedEncoded: 1}, func() {
		proxy.run(t, stream(unix.AF_INET).connect("127.128.0.1:8080").fails(unix.ECONNREFUSED))
	})
	// The neighbours of the range are like any other address.
	app := a.serve(taskUID, a.taskCg, "tcp4", "127.127.255.255:8080")
	a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.Local: 1}, func() {
		direct(t, p.last(t, stream(unix.AF_INET).connect(app.Addr.String()).ask("")).Answer, app.Name, app.Addr)
	})
	for _, next := range []string{"[fd77:6569:71ff:ffff:ffff:ffff:ffff:ffff]:8080", "[fd77:6569:7200::1:0:0]:8080"} {
		a.proxied(t, p, stream(unix.AF_INET6).connect(next).ask(""), next, a.v4)
	}
}

// A source in the range would show a peer that nobody dialled.
func TestOriginRangeIsNoSource(t *testing.T) {
	a := proxiedAlloc(t)
	a.serve(taskUID, a.taskCg, "tcp", "[::]:9000")
	p := a.task(t)
	// The kernel binds to an IPv6 address of no device only where it is told to.
	const freebind = 78 // IPV6_FREEBIND
	free6 := stream(unix.AF_INET6).set(unix.SOL_IPV6, freebind, 1)
	for _, bound := range []script{
		stream(unix.AF_INET).bind("127.128.0.1:0"),
		stream(unix.AF_INET).bind("127.200.0.1:4001"),
		stream(unix.AF_INET6).bind("[::ffff:127.128.0.1]:0"),
		free6.bind("[fd77:6569:7200::1]:0"),
	} {
		a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedEncoded: 1}, func() { p.run(t, bound.fails(unix.EADDRNOTAVAIL)) })
	}
	// Without a port the kernel does not ask at bind; it is refused at connect.
	later := stream(unix.AF_INET).set(unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1).bind("127.128.0.1:0")
	later6 := free6.set(unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1).bind("[fd77:6569:7200::1]:0")
	for _, s := range []script{
		later.connect(somewhere), later.connect("127.0.0.1:9000"),
		later6.connect("[2001:db8::1]:80"), later6.connect("[::1]:9000"),
	} {
		a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedEncoded: 1}, func() { p.run(t, s.fails(unix.ECONNREFUSED)) })
	}
}

// A port that a task of the allocation serves is dialled at another host.
func TestOriginOnAPortServedHere(t *testing.T) {
	a := proxiedAlloc(t)
	a.serve(taskUID, a.taskCg, "tcp", "[::]:8080")
	p := a.task(t)
	a.proxied(t, p, stream(unix.AF_INET).connect(somewhere).ask(""), somewhere, a.v4)
	a.proxied(t, p, stream(unix.AF_INET6).connect("[2001:db8::1]:8080").ask(""), "[2001:db8::1]:8080", a.v4)
}

// A task that asks for the origin of its own sockets, or for their peers, is
// told what a kernel without Weir tells.
func TestOriginIsNotForTasks(t *testing.T) {
	a := proxiedAlloc(t)
	plain := &alloc{NetNS: test.NewNetNS(t), taskCg: a.taskCg}
	// The server and its client are sockets of the same process.
	accepted := func(addr string) script {
		s := stream(unix.AF_INET)
		if netip.MustParseAddrPort(addr).Addr().Is6() {
			s = stream(unix.AF_INET6)
		}
		domain := s[0].Args[0]
		return s.bind(addr).listen().on("client").open(domain, unix.IPPROTO_TCP).connect(addr).
			on("").accept("server").on("server")
	}
	errnos := func(p actor, s script) (list []string) {
		for _, level := range []int{unix.SOL_IP, unix.SOL_IPV6} {
			for _, size := range []int{0, 4, 16, 28, 128} {
				s = s.original(level, size)
			}
		}
		var outcomes []outcome
		if err := p.Call(s, &outcomes); err != nil {
			t.Fatal(err)
		}
		for i, o := range outcomes {
			if s[i].Do == "original" {
				list = append(list, errnoName(o.Errno))
			} else if o.Errno != 0 {
				t.Fatalf("%s: %s", s[i], errnoName(o.Errno))
			}
		}
		return list
	}
	for name, tc := range map[string]struct{ plain, here script }{
		"accepted on loopback":    {accepted("127.0.0.1:7001"), accepted("127.0.0.1:7001")},
		"accepted on IPv6":        {accepted("[::1]:7002"), accepted("[::1]:7002")},
		"accepted on own address": {accepted("127.0.0.1:7003"), accepted(addrPort(a.v4, 7003))},
		"own IPv6 address":        {accepted("[::1]:7004"), accepted(addrPort(a.v6, 7004))},
		"client":                  {accepted("127.0.0.1:7005").on("client"), accepted("127.0.0.1:7005").on("client")},
		"client of the proxy":     {accepted("127.0.0.1:7006").on("client"), stream(unix.AF_INET).connect(somewhere)},
		"not connected":           {stream(unix.AF_INET), stream(unix.AF_INET)},
	} {
		t.Run(name, func(t *testing.T) {
			want := errnos(plain.task(t), tc.plain)
			if slices.Contains(want, errnoName(syscall.Errno(0))) {
				t.Fatalf("a kernel without Weir answers: %q", want)
			}
			if diff := cmp.Diff(want, errnos(a.task(t), tc.here)); diff != "" {
				t.Errorf("SO_ORIGINAL_DST (-without Weir +with):\n%s", diff)
			}
		})
	}
	for _, addr := range []string{"127.0.0.1:7011", "[::1]:7012", addrPort(a.v4, 7013), addrPort(a.v6, 7014)} {
		got := a.task(t).run(t, accepted(addr).names().on("client").names())
		server, client := got[len(got)-3].Answer, got[len(got)-1].Answer
		if server.To != client.From || server.From != client.To {
			t.Errorf("accepted on %s: peer is %s, the client is %s; its peer %s, the server is %s",
				addr, server.To, client.From, client.To, server.From)
		}
	}
}
