// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

const outboundListener = "127.0.0.1:15001"

// spread dials many times as a task and returns how often each listener answered. Not
// one connection may fail or carry a wrong origin.
func (a *alloc) spread(times int) map[string]int {
	t := a.node.t
	t.Helper()
	names := make(map[string]int)
	for i := range times {
		origin := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), uint16(1+i))
		answer, err := a.ask("tcp4", origin.String())
		if err != nil {
			t.Fatalf("dial %s, number %d of %d: %v", origin, i, times, err)
		}
		if answer.Origin != origin {
			t.Fatalf("dial %s: the proxy saw origin %s", origin, answer.Origin)
		}
		names[answer.Server]++
	}
	return names
}

// outboundRefused fails the test unless a task's connection is refused at once.
func (a *alloc) outboundRefused(origin string) {
	t := a.node.t
	t.Helper()
	if answer, err := a.ask("tcp4", origin); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial %s: %q answered, error %v, want connection refused", origin, answer.Server, err)
	}
}

func TestListenerDownAndUp(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	origin := netip.MustParseAddrPort("192.0.2.1:80")
	for range 3 {
		verdictsAre(t, a.rose(func() { a.outboundRefused(origin.String()) }), map[bpfmap.Verdict]uint64{bpfmap.RefusedNoProxy: 1})
		moved := a.rose(func() { a.outbound = a.serve(proxyUID, a.proxyCg, "tcp4", outboundListener) })
		verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.Listener: 1})
		answer, err := a.ask("tcp4", origin.String())
		a.answered(answer, err, origin, a.v4)
		a.outbound.Stop()
	}
	// The socket that was refused can try again.
	task := a.sockets(taskUID, a.taskCg)
	fd := task.open(unix.AF_INET, unix.SOCK_STREAM, 0)
	if _, err := task.try(socketCall{Op: "connect", FD: fd, Addr: origin}); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("connect while the proxy is down: %v, want connection refused", err)
	}
	a.serve(proxyUID, a.proxyCg, "tcp4", outboundListener)
	if _, err := task.try(socketCall{Op: "connect", FD: fd, Addr: origin}); err != nil {
		t.Errorf("connect the same socket once the proxy is up: %v", err)
	}
}

func TestListenerWorkers(t *testing.T) {
	for _, workers := range []int{4, 20} {
		t.Run(fmt.Sprint(workers), func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add()
			proxy := a.sockets(proxyUID, a.proxyCg)
			fds := make([]int, workers)
			moved := a.rose(func() {
				for i := range fds {
					fds[i] = proxy.mustListen(fmt.Sprint("worker ", i), outboundListener, reusePort())
				}
			})
			verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.Listener: uint64(workers)})
			times := test.Scale(40*workers) + 20*workers
			if got := a.spread(times); len(got) != workers {
				t.Errorf("%d connections reached %d of %d workers: %v", times, len(got), workers, got)
			}
			for _, gone := range []int{0, workers / 2, workers - 1} {
				proxy.close(fds[gone])
				got := a.spread(test.Scale(300))
				if times, stale := got[fmt.Sprint("worker ", gone)]; stale {
					t.Errorf("worker %d answered %d connections after it closed", gone, times)
				}
			}
			// All that were there when the others began, one by one.
			for i, fd := range fds {
				if i == 0 || i == workers/2 || i == workers-1 || i == 1 {
					continue
				}
				proxy.close(fd)
				a.spread(test.Scale(20))
			}
			proxy.close(fds[1])
			a.outboundRefused("192.0.2.1:80")
		})
	}
}

// A hot restart opens the new listeners before it closes the old ones.
func TestListenerHotRestart(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	old := a.sockets(proxyUID, a.proxyCg)
	for i := range 4 {
		old.mustListen(fmt.Sprint("generation 0 worker ", i), outboundListener, reusePort())
	}
	for generation := range 5 {
		next := a.sockets(proxyUID, a.proxyCg)
		for i := range 4 {
			next.mustListen(fmt.Sprintf("generation %d worker %d", generation+1, i), outboundListener, reusePort())
			a.spread(test.Scale(20))
		}
		old.Stop()
		for name := range a.spread(test.Scale(100)) {
			if want := fmt.Sprint("generation ", generation+1); name[:len(want)] != want {
				t.Errorf("%s answered after generation %d was gone", name, generation)
			}
		}
		old = next
	}
}

// A proxy with more listeners than there are slots loses nothing: the kernel spreads
// over the whole SO_REUSEPORT group, and CHECK fills slots that have become free.
func TestListenerMoreThanSlots(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	proxy := a.sockets(proxyUID, a.proxyCg)
	fds := make([]int, bpfmap.ListenerSlots+6)
	moved := a.rose(func() {
		for i := range fds {
			fds[i] = proxy.mustListen(fmt.Sprint("worker ", i), outboundListener, reusePort())
		}
	})
	verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.Listener: bpfmap.ListenerSlots, bpfmap.RefusedListenerTable: 6})
	a.spread(test.Scale(200))
	if repaired, err := n.Check(a.key, a.Path); err != nil || len(repaired) > 0 {
		t.Errorf("check with more listeners than slots: %v, repaired %q", err, repaired)
	}
	for _, fd := range fds[:bpfmap.ListenerSlots] {
		proxy.close(fd)
	}
	// What is left was never registered: refused, until a check takes it in.
	a.outboundRefused("192.0.2.1:80")
	if repaired, err := n.Check(a.key, a.Path); err != nil || len(repaired) != 6 {
		t.Errorf("check with listeners that are not registered: %v, repaired %q, want 6 steps", err, repaired)
	}
	a.spread(test.Scale(100))
}

// An MPTCP listener cannot be handed connections by sk_lookup through a map.
func TestListenerMPTCP(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	proxy := a.sockets(proxyUID, a.proxyCg)
	var fd int
	moved := a.rose(func() {
		var err error
		fd, err = proxy.listen("mptcp", outboundListener, unix.IPPROTO_MPTCP)
		if err != nil {
			t.Fatal(err)
		}
	})
	verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.RefusedListenerTable: 1})
	verdictsAre(t, a.rose(func() { a.outboundRefused("192.0.2.1:80") }), map[bpfmap.Verdict]uint64{bpfmap.RefusedNoProxy: 1})
	// It is no damage that a CHECK could repair, and no reason to end the allocation.
	if repaired, err := n.Check(a.key, a.Path); err != nil || len(repaired) > 0 {
		t.Errorf("check with an MPTCP listener: %v, repaired %q", err, repaired)
	}
	proxy.close(fd)
	a.outbound = a.serve(proxyUID, a.proxyCg, "tcp4", outboundListener)
	origin := netip.MustParseAddrPort("192.0.2.1:80")
	answer, err := a.ask("tcp4", origin.String())
	a.answered(answer, err, origin, a.v4)
}

// A task that listens on the proxy's ports never gets a redirected connection: not
// while the proxy is down, not beside it.
func TestListenerOfATask(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	task := a.sockets(taskUID, a.taskCg)
	beside := a.sockets(proxyUID, a.taskCg) // under the proxy's UID, elsewhere
	for _, hostile := range []struct {
		addr    string
		verdict bpfmap.Verdict
	}{
		{"127.0.0.1:15001", bpfmap.RefusedListenerIdentity},
		{"127.0.0.2:15001", bpfmap.RefusedListenerAddress},
		{"0.0.0.0:15001", bpfmap.RefusedListenerIdentity},
		{"[::]:15001", bpfmap.RefusedListenerIdentity},
		{"[::1]:15001", bpfmap.RefusedListenerIdentity},
		{addrPort(a.v4, 15001), bpfmap.RefusedListenerAddress},
		{"0.0.0.0:20000", bpfmap.RefusedListenerIdentity},
		{addrPort(a.v4, 20000), bpfmap.RefusedListenerIdentity},
		{"[::]:20000", bpfmap.RefusedListenerIdentity},
	} {
		var fd int
		moved := a.rose(func() { fd = task.mustListen("hostile", hostile.addr, reusePort()) })
		verdictsAre(t, moved, map[bpfmap.Verdict]uint64{hostile.verdict: 1})
		a.outboundRefused("192.0.2.1:80")
		a.outboundRefused("192.0.2.1:15001")
		a.refused(a.v4, 20000)
		a.refused(a.v6, 8080)
		if repaired, err := n.Check(a.key, a.Path); err != nil || len(repaired) > 0 {
			t.Errorf("check beside a task on %s: %v, repaired %q", hostile.addr, err, repaired)
		}
		a.outboundRefused("192.0.2.1:80")
		task.close(fd)
	}
	proxy := a.sockets(proxyUID, a.proxyCg)
	proxy.mustListen("proxy", outboundListener, reusePort())
	proxy.mustListen("proxy", "0.0.0.0:20000", reusePort())
	only := func(who string) {
		t.Helper()
		if got := a.spread(test.Scale(100)); len(got) != 1 || got["proxy"] == 0 {
			t.Errorf("%s: who answered: %v", who, got)
		}
		for range test.Scale(50) {
			a.arrives(a.v4, 8080, "proxy", true)
		}
	}
	// The kernel lets a socket into the proxy's SO_REUSEPORT group by UID alone.
	for _, addr := range []string{outboundListener, "0.0.0.0:20000", "127.0.0.2:15001", addrPort(a.v4, 20000), "[::]:20000"} {
		for who, hosted := range map[string]*sockets{"another UID": task, "the proxy's UID in another cgroup": beside} {
			fd, err := hosted.listen("hostile", addr, 0, reusePort())
			only(fmt.Sprintf("%s on %s (%v)", who, addr, err))
			if _, err := n.Check(a.key, a.Path); err != nil {
				t.Errorf("check beside %s on %s: %v", who, addr, err)
			}
			only(fmt.Sprintf("%s on %s after a check", who, addr))
			hosted.close(fd)
		}
	}
}

// A listener that is older than its row is registered, by the same identity test.
func TestListenerOlderThanItsRow(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.startProxy()
	a.add()
	origin := netip.MustParseAddrPort("192.0.2.1:80")
	answer, err := a.ask("tcp4", origin.String())
	a.answered(answer, err, origin, a.v4)
	a.arrives(a.v4, 8080, a.inbound.Name, true)
	if got := a.status().Proxy; got.Cgroup != a.proxyCg.ID || got.Identity != inspect.IdentityCgroup || got.Listeners != 2 {
		t.Errorf("proxy of adopted listeners: %+v, want cgroup %d and 2 listeners", got, a.proxyCg.ID)
	}
	if repaired, err := n.Check(a.key, a.Path); err != nil || len(repaired) > 0 {
		t.Errorf("check after listeners were registered: %v, repaired %q", err, repaired)
	}
	// The proxy comes back in the same cgroup: nothing to repair.
	a.outbound.Stop()
	a.inbound.Stop()
	a.outboundRefused(origin.String())
	a.refused(a.v4, 8080)
	a.startProxy()
	answer, err = a.ask("tcp4", origin.String())
	a.answered(answer, err, origin, a.v4)
	a.arrives(a.v4, 8080, a.inbound.Name, true)
}

func TestListenerOlderThanItsRowOfATask(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.serve(taskUID, a.taskCg, "tcp4", outboundListener)
	a.serve(taskUID, a.taskCg, "tcp4", "0.0.0.0:20000")
	a.add()
	a.outboundRefused("192.0.2.1:80")
	a.refused(a.v4, 8080)
	if got := a.status().Proxy; got.Listeners != 0 || got.Cgroup != 0 {
		t.Errorf("proxy without a listener of its UID: %+v", got)
	}
}

func TestListenerOlderThanItsRowMPTCP(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	proxy := a.sockets(proxyUID, a.proxyCg)
	if _, err := proxy.listen("mptcp", outboundListener, unix.IPPROTO_MPTCP); err != nil {
		t.Fatal(err)
	}
	a.add()
	a.outboundRefused("192.0.2.1:80")
}

// An adopted proxy that comes back in another cgroup is refused until a CHECK.
func TestListenerAdoptedThenElsewhere(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.startProxy()
	a.add()
	a.spread(3)
	a.outbound.Stop()
	a.inbound.Stop()
	a.proxyCg = test.NewCgroup(t)
	moved := a.rose(func() { a.startProxy() })
	verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.RefusedListenerIdentity: 2})
	a.outboundRefused("192.0.2.1:80")
	a.refused(a.v4, 8080)
	// Nor does the unknown proxy pass the mesh.
	if _, err := a.askAs(proxyUID, a.proxyCg, "tcp4", addrPort(remote4(1), 80)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial as the unknown proxy: %v, want connection refused", err)
	}
	if repaired, err := n.Check(a.key, a.Path); err != nil || len(repaired) != 2 {
		t.Errorf("check: %v, repaired %q, want both listeners", err, repaired)
	}
	a.spread(3)
	a.arrives(a.v4, 8080, a.inbound.Name, true)
	if got := a.status().Proxy.Cgroup; got != a.proxyCg.ID {
		t.Errorf("cgroup of the proxy is %d, want %d", got, a.proxyCg.ID)
	}
}

// status returns the allocation's row of Workloads.
func (a *alloc) status() inspect.WorkloadStatus {
	a.node.t.Helper()
	list, err := a.node.Workloads()
	if err != nil {
		a.node.t.Fatal(err)
	}
	for _, w := range list {
		if w.Key == a.key {
			return w
		}
	}
	a.node.t.Fatalf("workload %s is not listed", a.key)
	return inspect.WorkloadStatus{}
}
