// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/monitor"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// outcomesOf is how many connections from inside have an outcome.
func outcomesOf(counts map[bpfmap.Verdict]uint64) (sum uint64) {
	for verdict, count := range counts {
		if verdict.IsConnection() && !slices.Contains(inboundVerdicts(), verdict) {
			sum += count
		}
	}
	return sum
}

// dialKind is a connection of which it is known what becomes of it.
type dialKind struct {
	uid    uint32 // of the task
	script script
	want   bpfmap.Verdict
	origin netip.AddrPort // what an event tells of it
}

const outcomeUID = 2000 // is excluded

// dialKinds are connections of an allocation with two proxies, of which the second does
// not listen. They never last.
func dialKinds(a *alloc) (kinds []dialKind) {
	add := func(uid uint32, want bpfmap.Verdict, s script, errno syscall.Errno) {
		last := s[len(s)-1]
		if errno != 0 {
			s = s.fails(errno)
		}
		kinds = append(kinds, dialKind{uid: uid, script: s, want: want, origin: last.Addr})
	}
	connect := func(addr string) script {
		domain := unix.AF_INET
		if netip.MustParseAddrPort(addr).Addr().Is6() {
			domain = unix.AF_INET6
		}
		return stream(domain).connect(addr)
	}
	remote := addrPort(remote4(a.number), 80)
	add(taskUID, bpfmap.Redirected, connect("192.0.2.1:80"), 0)
	add(taskUID, bpfmap.Redirected, connect("[2001:db8::1]:443"), 0)
	add(taskUID, bpfmap.Redirected, stream(unix.AF_INET).to("connectLater", "192.0.2.2:80"), 0)
	add(taskUID, bpfmap.Redirected, script(nil).open(unix.AF_INET, unix.IPPROTO_MPTCP).connect("192.0.2.3:80"), 0)
	add(outcomeUID, bpfmap.UIDExcluded, connect(remote), 0)
	add(taskUID, bpfmap.PortExcluded, connect(addrPort(remote4(a.number), 8080)), 0)
	add(taskUID, bpfmap.CIDRExcluded, connect(addrPort(remote6(a.number), 80)), 0)
	add(taskUID, bpfmap.Local, connect(addrPort(a.v4, 7070)), 0)
	add(taskUID, bpfmap.Local, connect("127.0.0.1:9"), unix.ECONNREFUSED)
	add(taskUID, bpfmap.ToDNS, connect(addrPort(remote4(a.number), 53)), 0)
	add(taskUID, bpfmap.ToUpstream, connect("240.0.0.5:80"), 0)
	add(taskUID, bpfmap.RefusedNoProxy, connect("240.0.0.2:80"), unix.ECONNREFUSED)
	add(taskUID, bpfmap.RefusedNoProxy, connect("[fd09:1::6]:80"), unix.ECONNREFUSED)
	add(taskUID, bpfmap.RefusedNoProxy, stream(unix.AF_INET).to("connectLater", "240.0.0.2:81"), unix.ECONNREFUSED)
	add(taskUID, bpfmap.RefusedNoProxy, script(nil).open(unix.AF_INET, unix.IPPROTO_MPTCP).connect("240.0.0.2:82"), unix.ECONNREFUSED)
	add(outcomeUID, bpfmap.RefusedEncoded, connect("127.128.0.7:80"), unix.ECONNREFUSED)
	add(taskUID, bpfmap.RefusedFamily, stream(unix.AF_INET6).set(unix.SOL_IPV6, unix.IPV6_V6ONLY, 1).connect("[2001:db8::2]:80"), unix.ENETUNREACH)
	add(taskUID, bpfmap.RefusedBroadcast, connect("224.0.0.1:80"), unix.ENETUNREACH)
	// The device is what a task may bind to without a capability.
	add(taskUID, bpfmap.RefusedSource, stream(unix.AF_INET6).set(unix.SOL_IPV6, unix.IPV6_FREEBIND, 1).bind("[2001:db8::99]:0").connect("[2001:db8::3]:80"), unix.ENETUNREACH)
	return kinds
}

// mixed is such an allocation, with whatever else the connections need.
func mixed(t *testing.T) *alloc {
	t.Helper()
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) {
		r.ExcludeUIDs, r.ExcludeOutboundPorts = []uint32{outcomeUID}, []uint16{8080}
		r.ExcludeOutboundCIDRs = []netip.Prefix{netip.PrefixFrom(remote6(a.number), 128)}
		r.DNS = workload.DNS{Address: remote4(a.number), Port: resolverPort}
	})
	if err := n.SetMeshConfig(a.key, workload.MeshConfig{
		Service:   "api",
		Upstreams: []workload.Upstream{{Name: "db", Addresses: test.Addrs("240.0.0.5"), Listener: netip.MustParseAddrPort("127.0.0.1:9191")}},
		Proxies:   []workload.Sidecar{{Service: "web", InboundPort: secondInbound, OutboundPort: secondOutbound, VirtualIPs: test.Addrs("240.0.0.2", "fd09:1::6")}},
	}); err != nil {
		t.Fatal(err)
	}
	for _, port := range []uint16{80, 8080, resolverPort} {
		test.Echo(t, n.remote, "tcp", fmt.Sprintf("[::]:%d", port))
	}
	a.startProxy()
	a.serve(taskUID, a.taskCg, "tcp", "[::]:7070")
	a.serve(proxyUID, a.proxyCg, "tcp4", "127.0.0.1:9191")
	return a
}

// Whatever becomes of a connection, it is counted once: the outcomes add up to the dials.
// And each one that is refused says which process did dial, as whom, and where.
func TestOutcomesAddUpToTheDials(t *testing.T) {
	a := mixed(t)
	actors := map[uint32]actor{taskUID: a.task(t), outcomeUID: a.actor(t, outcomeUID, a.taskCg)}
	kinds := dialKinds(a)
	random := rand.New(rand.NewPCG(12, 1))
	want := make(map[bpfmap.Verdict]uint64)
	dial := func(kind dialKind) {
		actors[kind.uid].run(t, kind.script)
		want[kind.want]++
	}

	reader := a.node.readEvents()
	var refused []monitor.Event
	for _, kind := range kinds {
		dial(kind)
		if kind.want.Refused() {
			refused = append(refused, monitor.Event{Cookie: a.Cookie(), Verdict: kind.want, Name: kind.want.String(), Origin: kind.origin,
				UID: kind.uid, PID: uint32(actors[kind.uid].PID), Command: command(t, actors[kind.uid].PID), Cgroup: a.taskCg.ID})
		}
	}
	marker := netip.MustParseAddrPort("203.0.113.1:1")
	dial(dialKind{uid: taskUID, script: stream(unix.AF_INET).connect(marker.String()), want: bpfmap.Redirected})
	told := slices.DeleteFunc(reader.until(marker), func(e monitor.Event) bool { return !e.Verdict.Refused() })
	reader.end()
	equal := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
	if diff := cmp.Diff(refused, told, equal, cmpopts.IgnoreFields(monitor.Event{}, "Time", "Destination")); diff != "" {
		t.Errorf("events of refusals (-want +got):\n%s", diff)
	}

	dials := test.Scale(10000)
	for range dials - len(kinds) - 1 {
		dial(kinds[random.IntN(len(kinds))])
	}
	got := a.counts()
	if sum := outcomesOf(got); sum != uint64(dials) {
		t.Errorf("the outcomes of %d dials add up to %d", dials, sum)
	}
	maps.DeleteFunc(got, func(v bpfmap.Verdict, _ uint64) bool { // listeners, and late packets of the remote
		return !v.IsConnection() || slices.Contains(inboundVerdicts(), v)
	})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("verdicts (-want +got):\n%s", diff)
	}
}

// A proxy that ends and comes back under load, again and again: each dial counts once,
// also the one whose listener closes while its packet is under way.
func TestOutcomesWhileTheProxyEnds(t *testing.T) {
	a := newNode(t).newAlloc()
	a.add()
	a.startProxy()
	task := a.loadTask(t)
	l := load{Proxy: 1, Connections: test.Scale(20000), Destinations: 16, Ports: 100, Workers: 4}
	var result loadResult
	done := make(chan error, 1)
	before := a.counts()
	go func() { done <- task.Call(l, &result) }()
	ends, redirected := 0, before[bpfmap.Redirected]
	for running := true; running; {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		default:
			if now := a.counts()[bpfmap.Redirected]; now < redirected+100 {
				continue // it is to have some connections
			} else {
				redirected = now
			}
			a.outbound.Stop()
			a.outbound = a.serve(proxyUID, a.proxyCg, "tcp4", fmt.Sprintf("127.0.0.1:%d", outboundPort))
			ends++
		}
	}
	moved := a.counts()
	for verdict, count := range before {
		moved[verdict] -= count
	}
	if sum := outcomesOf(moved); sum != uint64(l.Connections) || moved[bpfmap.RefusedNoProxy] == 0 || moved[bpfmap.Redirected] == 0 {
		t.Errorf("%d dials, whose outcomes add up to %d: %v", l.Connections, sum, moved)
	}
	t.Logf("the proxy ended %d times: %v", ends, moved)
}

// What waits in the gate has no outcome yet. It has one when the proxy takes it, when the
// gate closes, or when the application gives up; and who dialled is told then.
func TestOutcomesOfWhatWaits(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(a *alloc, g *Gate, task actor)
		want bpfmap.Verdict
	}{
		{"the proxy listens", func(a *alloc, _ *Gate, _ actor) { a.startProxy() }, bpfmap.Redirected},
		{"the gate closes", func(a *alloc, g *Gate, _ actor) {
			if err := g.Close(); err != nil {
				a.node.t.Error(err)
			}
		}, bpfmap.RefusedNoProxy},
		{"the application disconnects", func(a *alloc, _ *Gate, task actor) {
			task.run(a.node.t, script{}.on("four").disconnect().on("six").disconnect().on("bound").disconnect())
		}, bpfmap.RefusedNoProxy},
		{"the application ends", func(_ *alloc, _ *Gate, task actor) { task.Stop() }, bpfmap.RefusedNoProxy},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add()
			gate, err := n.OpenGate(a.key)
			if err != nil {
				t.Fatal(err)
			}
			defer gate.Close()
			reader := n.readEvents()
			task := a.task(t)
			name := command(t, task.PID)
			dials := map[string]script{
				"192.0.2.1:80":       script{}.on("four").open(unix.AF_INET, unix.IPPROTO_TCP),
				"[2001:db8::1]:443":  script{}.on("six").open(unix.AF_INET6, unix.IPPROTO_TCP),
				"198.51.100.7:65535": script{}.on("bound").open(unix.AF_INET, unix.IPPROTO_TCP).bind(addrPort(a.v4, 4444)),
			}
			for to, s := range dials {
				task.run(t, s.to("connectStart", to).fails(unix.EINPROGRESS))
			}
			eventuallyWaits(t, gate, len(dials))
			if got := outcomesOf(a.counts()); got != 0 {
				t.Errorf("%d of the connections that wait have an outcome", got)
			}
			tc.end(a, gate, task)
			test.Eventually(t, func() error {
				if got := a.counts(); got[tc.want] != uint64(len(dials)) || outcomesOf(got) != uint64(len(dials)) {
					return fmt.Errorf("verdicts are %v", got)
				}
				return nil
			}, "an outcome for each")
			marker := netip.MustParseAddrPort("127.0.0.1:1")
			a.task(t).run(t, stream(unix.AF_INET).connect(marker.String()).fails(unix.ECONNREFUSED))
			told := make(map[string]bool)
			for _, e := range reader.until(marker) {
				if e.Verdict != tc.want {
					continue // a listener
				}
				told[e.Origin.String()] = true
				if e.PID != uint32(task.PID) || e.Command != name || e.UID != taskUID || e.Cgroup != a.taskCg.ID {
					t.Errorf("event is %+v; want process %d (%s), user %d, cgroup %d", e, task.PID, name, taskUID, a.taskCg.ID)
				}
			}
			reader.end()
			for to := range dials {
				if !told[to] {
					t.Errorf("no event of the connection to %s: %v", to, told)
				}
			}
		})
	}
}
