// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/monitor"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

const eventsFunc = "redirect.events"

// serveEvents reads events until it is killed.
func serveEvents(args []string) error {
	var paths store.Paths
	if err := json.Unmarshal([]byte(args[0]), &paths); err != nil {
		return err
	}
	return New(paths).Events(context.Background(), func(monitor.Event) error { return nil })
}

// reading is a reader of events in the test's own process.
type reading struct {
	t      *testing.T
	stop   context.CancelFunc
	done   chan error
	mutex  sync.Mutex
	events []monitor.Event
}

// readEvents starts a reader and returns once the kernel writes for it.
func (n *node) readEvents() *reading {
	n.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r := &reading{t: n.t, stop: cancel, done: make(chan error, 1)}
	former := n.lease() // of a reader that died
	go func() {
		r.done <- n.Events(ctx, func(event monitor.Event) error {
			r.mutex.Lock()
			defer r.mutex.Unlock()
			r.events = append(r.events, event)
			return nil
		})
	}()
	n.t.Cleanup(cancel)
	test.Eventually(n.t, func() error {
		if n.lease() <= former {
			return errors.New("the reader has not begun")
		}
		return nil
	}, "a lease of the reader's own")
	return r
}

// end stops the reader and fails the test unless it ends without an error.
func (r *reading) end() {
	r.t.Helper()
	r.stop()
	if err := <-r.done; err != nil {
		r.t.Errorf("events: %v", err)
	}
}

// until returns what was delivered up to an event with that origin, which is left out.
func (r *reading) until(last netip.AddrPort) (events []monitor.Event) {
	r.t.Helper()
	test.Eventually(r.t, func() error {
		r.mutex.Lock()
		defer r.mutex.Unlock()
		for i, event := range r.events {
			if event.Origin == last {
				events = append([]monitor.Event(nil), r.events[:i]...)
				return nil
			}
		}
		return fmt.Errorf("%d events, none with origin %s", len(r.events), last)
	}, "the last event")
	return events
}

// lease returns when the programs stop to write events, on their clock.
func (n *node) lease() uint64 {
	n.t.Helper()
	tables, err := bpfmap.OpenTables(n.Paths().Maps())
	if err != nil {
		n.t.Fatal(err)
	}
	defer tables.Close()
	var row bpfmap.BpfControl
	if _, err := tables.Get("control", uint32(0), &row); err != nil {
		n.t.Fatal(err)
	}
	return row.EventsUntilNs
}

// leased waits until somebody reads events, or nobody does.
func (n *node) leased(want bool) {
	n.t.Helper()
	test.Eventually(n.t, func() error {
		if until := n.lease(); until > bpfmap.MonotonicNow() != want {
			return fmt.Errorf("lease until %d, now is %d", until, bpfmap.MonotonicNow())
		}
		return nil
	}, fmt.Sprintf("events to be leased: %t", want))
}

// produced returns how many bytes were ever written to the ring.
func (n *node) produced() uint64 {
	n.t.Helper()
	ring, err := ebpf.LoadPinnedMap(n.Paths().Maps()+"/events", nil)
	if err != nil {
		n.t.Fatal(err)
	}
	defer ring.Close()
	page := os.Getpagesize()
	view, err := unix.Mmap(ring.FD(), int64(page), page, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		n.t.Fatalf("map ring: %v", err)
	}
	written := binary.NativeEndian.Uint64(view)
	if err := unix.Munmap(view); err != nil {
		n.t.Fatalf("unmap ring: %v", err)
	}
	return written
}

// command is what the kernel calls a process.
func command(t *testing.T, pid int) string {
	t.Helper()
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(name))
}

func TestEvents(t *testing.T) {
	n := newNode(t)
	a, b := n.newAlloc(), n.newAlloc()
	excluded := uint32(2000)
	a.add(func(r *workload.Request) {
		r.ExcludeUIDs, r.ExcludeInboundPorts = []uint32{excluded}, []uint16{9000}
		r.DNS = workload.DNS{Address: remote4(1), Port: resolverPort}
	})
	b.add()
	remote := netip.AddrPortFrom(remote4(1), 80)
	test.Echo(t, n.remote, "tcp", "[::]:80")
	startResolver(t, n.remote, resolverPort)
	a.startProxy()
	a.serve(taskUID, a.taskCg, "tcp", "[::]:9000")
	reader := n.readEvents()

	var want []monitor.Event
	// Ask as whom, for what, with which outcome.
	expect := func(w *alloc, uid uint32, cgroup *test.Cgroup, network string, origin, destination netip.AddrPort, verdict bpfmap.Verdict) {
		t.Helper()
		_, err := w.askAs(uid, cgroup, network, origin.String())
		if refused := err != nil; refused != verdict.Refused() {
			t.Errorf("dial %s: %v", origin, err)
		}
		client := w.taskCache[test.Spec{NetNS: w.NetNS, Cgroup: cgroup, UID: uid, GID: uid}]
		want = append(want, monitor.Event{Cookie: w.Cookie(), Verdict: verdict, Name: verdict.String(), Origin: origin, Destination: destination,
			UID: uid, PID: uint32(client.PID), Cgroup: cgroup.ID, Command: command(t, client.PID)})
	}
	first, _ := workload.EncodedAddrs(1)
	second, _ := workload.EncodedAddrs(2)
	six := netip.AddrPortFrom(remote6(1), 8080)
	local := netip.MustParseAddrPort("127.0.0.1:9000")
	encoded := netip.MustParseAddrPort("127.128.0.1:80")
	name := netip.AddrPortFrom(remote4(1), 53)
	expect(a, taskUID, a.taskCg, "tcp4", remote, netip.AddrPortFrom(first, 80), bpfmap.Redirected)
	expect(a, taskUID, a.taskCg, "tcp", six, netip.AddrPortFrom(second, 8080), bpfmap.Redirected)
	expect(a, proxyUID, a.proxyCg, "tcp4", remote, remote, bpfmap.Proxy)
	expect(a, excluded, a.taskCg, "tcp4", remote, remote, bpfmap.UIDExcluded)
	expect(a, taskUID, a.taskCg, "tcp4", local, local, bpfmap.Local)
	expect(a, taskUID, a.taskCg, "tcp4", encoded, encoded, bpfmap.RefusedEncoded)
	expect(a, taskUID, a.taskCg, "tcp4", name, netip.AddrPortFrom(remote4(1), resolverPort), bpfmap.ToDNS)
	expect(b, taskUID, b.taskCg, "tcp4", remote, netip.AddrPortFrom(first, 80), bpfmap.RefusedNoProxy)
	for port, verdict := range map[uint16]bpfmap.Verdict{8080: bpfmap.Inbound, 9000: bpfmap.InboundExcluded} {
		answer, err := a.fromOutside(a.v4, port)
		if err != nil {
			t.Fatal(err)
		}
		to := netip.AddrPortFrom(a.v4, port)
		want = append(want, monitor.Event{Cookie: a.Cookie(), Verdict: verdict, Name: verdict.String(), Source: answer.From, Origin: to, Destination: to})
	}
	b.refused(b.v6, 8080)
	to := netip.AddrPortFrom(b.v6, 8080)
	want = append(want, monitor.Event{Cookie: b.Cookie(), Verdict: bpfmap.RefusedInboundNoProxy, Name: bpfmap.RefusedInboundNoProxy.String(),
		Source: netip.AddrPortFrom(remote6(2), 0), Origin: to, Destination: to})

	marker := netip.MustParseAddrPort("203.0.113.1:1")
	if _, err := a.ask("tcp4", marker.String()); err != nil {
		t.Fatal(err)
	}
	got := reader.until(marker)
	reader.end()
	// The source port of who was refused is known to nobody but the kernel.
	for i, event := range got {
		if event.Source.IsValid() && event.Source.Port() == 0 {
			t.Errorf("event without a source port: %+v", event)
		}
		if event.Verdict == bpfmap.RefusedInboundNoProxy {
			got[i].Source = netip.AddrPortFrom(event.Source.Addr(), 0)
		}
		if age := time.Since(event.Time); age < 0 || age > time.Minute {
			t.Errorf("event is dated %s, %s ago", event.Time, age)
		}
	}
	equal := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
	if diff := cmp.Diff(want, got, equal, cmpopts.IgnoreFields(monitor.Event{}, "Time")); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}

// What the guard would refuse, what it refuses and what it cannot judge are each
// told as they happen, with who dialled.
func TestEventsOfTheGuard(t *testing.T) {
	for guard, closed := range map[workload.Guard]bpfmap.Verdict{workload.GuardAudit: bpfmap.GuardAudited, workload.GuardEnforce: bpfmap.RefusedGuard} {
		t.Run(string(guard), func(t *testing.T) {
			a := guarded(t, guard)
			reader := a.node.readEvents()
			from := map[netip.Addr]netip.Addr{a.v4: remote4(a.number), a.v6: remote6(a.number)}
			var want []monitor.Event
			for _, dial := range []struct {
				network string
				port    uint16
				verdict bpfmap.Verdict
			}{
				{"tcp", 8080, closed}, {"tcp", outboundPort, closed}, {"tcp", 7070, bpfmap.InboundExcluded},
				{"udp", 8080, closed}, {"udp", 40000, bpfmap.GuardEphemeral},
			} {
				for _, addr := range []netip.Addr{a.v4, a.v6} {
					to := netip.AddrPortFrom(addr, dial.port)
					answer, err := test.Ask(a.node.remote, dial.network, to.String())
					if (err != nil) != dial.verdict.Refused() {
						t.Errorf("%s dial of %s: %v, the verdict is to be %s", dial.network, to, err, dial.verdict)
					}
					if err != nil { // nobody but the kernel knows the port
						answer.From = netip.AddrPortFrom(from[addr], 0)
					}
					want = append(want, monitor.Event{Cookie: a.Cookie(), Verdict: dial.verdict, Name: dial.verdict.String(), Source: answer.From, Origin: to, Destination: to})
				}
			}
			marker := netip.AddrPortFrom(a.v4, inboundPort+1)
			if _, err := a.fromOutside(marker.Addr(), marker.Port()); err == nil {
				t.Fatal("somebody listens on the marker's port")
			}
			got := reader.until(marker)
			reader.end()
			// A packet that comes when its connection is gone is looked up, and told, like a new one.
			got = slices.CompactFunc(got, func(a, b monitor.Event) bool { b.Time = a.Time; return a == b })
			for i, event := range got {
				if event.Source.Port() == 0 {
					t.Errorf("event without a source port: %+v", event)
				}
				if event.Verdict.Refused() {
					got[i].Source = netip.AddrPortFrom(event.Source.Addr(), 0)
				}
			}
			equal := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
			if diff := cmp.Diff(want, got, equal, cmpopts.IgnoreFields(monitor.Event{}, "Time")); diff != "" {
				t.Errorf("events (-want +got):\n%s", diff)
			}
		})
	}
}

func TestEventsCostNothingUnread(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	quiet := func(what string) {
		t.Helper()
		before := n.produced()
		a.spread(test.Scale(20))
		a.arrives(a.v4, 8080, a.inbound.Name, true)
		if wrote := n.produced() - before; wrote != 0 {
			t.Errorf("%s: %d bytes of events were written", what, wrote)
		}
	}
	quiet("before anybody reads")
	reader := n.readEvents()
	before := n.produced()
	a.spread(3)
	if n.produced() == before {
		t.Error("no event was written for a reader")
	}
	if err := n.Events(context.Background(), func(monitor.Event) error { return nil }); !errors.Is(err, monitor.ErrBusy) {
		t.Errorf("a second reader: %v, want busy", err)
	}
	n.leased(true) // the second did not end the first one's
	reader.end()
	quiet("after the reader ended")

	// The reader's own error ends it too.
	broken := errors.New("write: broken pipe")
	done := make(chan error, 1)
	go func() { done <- n.Events(context.Background(), func(monitor.Event) error { return broken }) }()
	n.leased(true)
	a.spread(1)
	if err := <-done; !errors.Is(err, broken) {
		t.Errorf("events to a reader that fails: %v", err)
	}
	quiet("after the reader failed")
}

// A reader that is killed leaves no cost behind, and nothing to the next one.
func TestEventsOfADeadReader(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	paths, err := json.Marshal(n.Paths())
	if err != nil {
		t.Fatal(err)
	}
	dead := test.Helper(t, test.Spec{NetNS: n.remote}, eventsFunc, string(paths))
	n.leased(true)
	if err := unix.Kill(dead.PID, unix.SIGSTOP); err != nil {
		t.Fatalf("stop the reader: %v", err)
	}
	stale := netip.MustParseAddrPort("192.0.2.1:666")
	if _, err := a.ask("tcp4", stale.String()); err != nil {
		t.Fatal(err)
	}
	dead.Stop()
	if ahead := time.Duration(n.lease() - bpfmap.MonotonicNow()); ahead > monitor.EventLease {
		t.Errorf("the lease of a dead reader runs for %s more, want at most %s", ahead, monitor.EventLease)
	}
	// The next reader does not have to wait for that.
	reader := n.readEvents()
	marker := netip.MustParseAddrPort("203.0.113.1:1")
	if _, err := a.ask("tcp4", marker.String()); err != nil {
		t.Fatal(err)
	}
	if got := reader.until(marker); len(got) > 0 {
		t.Errorf("events from before the reader began: %+v", got)
	}
	reader.end()

	dead = test.Helper(t, test.Spec{NetNS: n.remote}, eventsFunc, string(paths))
	n.leased(true)
	dead.Stop()
	n.leased(false)
	before := n.produced()
	a.spread(test.Scale(20))
	if wrote := n.produced() - before; wrote != 0 {
		t.Errorf("%d bytes of events were written after the lease of a dead reader ran out", wrote)
	}
}
