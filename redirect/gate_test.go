// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/explain"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// asked is what came of a connection that was dialled in the background.
type asked struct {
	answer test.Answer
	err    error
}

// dialInBackground dials as a task does, with a process of its own.
func (a *alloc) dialInBackground(addr string) <-chan asked {
	a.node.t.Helper()
	client := test.NewClient(a.node.t, test.Spec{NetNS: a.NetNS, Cgroup: a.taskCg, UID: taskUID, GID: taskUID})
	done := make(chan asked, 1)
	go func() {
		answer, err := client.Ask("tcp4"+test.Waiting, addr)
		done <- asked{answer, err}
	}()
	return done
}

// eventuallyWaits waits until so many connections do.
func eventuallyWaits(t *testing.T, g *Gate, want int) {
	t.Helper()
	test.Eventually(t, func() error {
		state, err := g.Look()
		if err != nil || len(state.Waiting) != want || state.Listens {
			return fmt.Errorf("gate is %+v, %w; want %d that wait", state, err, want)
		}
		return nil
	}, "connections to wait")
}

// What is dialled before the proxy listens waits for it, and reaches it with its
// origin. Once it listens, a proxy that stops is refused at once, as without a gate.
func TestGateHoldsUntilTheProxyListens(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	if _, err := a.ask("tcp4", addrPort(remote4(1), 80)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Fatalf("dial without a gate: %v, want it refused", err)
	}
	gate, err := n.OpenGate(a.key)
	if err != nil {
		t.Fatal(err)
	}
	var waiting []<-chan asked
	for i := range 3 {
		waiting = append(waiting, a.dialInBackground(addrPort(remote4(1), uint16(80+i))))
	}
	eventuallyWaits(t, gate, len(waiting))
	before := a.counts()
	if before[bpfmap.Redirected] != 0 || before[bpfmap.RefusedNoProxy] != 1 {
		t.Errorf("verdicts while they wait: %v", before)
	}
	a.startProxy()
	for i, done := range waiting {
		got := <-done
		if want := addrPort(remote4(1), uint16(80+i)); got.err != nil || got.answer.Origin.String() != want {
			t.Errorf("a connection that waited: %+v, %v; want origin %s", got.answer, got.err, want)
		}
	}
	state, err := gate.Look()
	if err != nil || !state.Listens || len(state.Waiting) > 0 {
		t.Errorf("gate is %+v, %v; want that the proxy listens", state, err)
	}
	if err := gate.Close(); err != nil {
		t.Error(err)
	}
	if now := a.counts(); now[bpfmap.Redirected] != uint64(len(waiting)) || now[bpfmap.RefusedNoProxy] != 1 {
		t.Errorf("verdicts of %d that waited: %v", len(waiting), now)
	}
	a.works()
	a.outbound.Stop()
	if _, err := a.ask("tcp4", addrPort(remote4(1), 80)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial when the proxy stopped: %v, want it refused", err)
	}
	a.remove()
	nothingLeft(t, n.Datapath)
}

// What waits is tried again every second, however long the proxy takes: with the gaps
// that the kernel has by default the ninth SYN would leave after more than half a minute.
func TestGateIsTriedEverySecond(t *testing.T) {
	const file = "/proc/sys/net/ipv4/tcp_syn_linear_timeouts"
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	gate, err := n.OpenGate(a.key)
	if err != nil {
		t.Fatal(err)
	}
	defer gate.Close()
	var value []byte
	a.Do(func() { value, err = os.ReadFile(file) })
	if errors.Is(err, fs.ErrNotExist) {
		return // before Linux 6.5 nothing can be said, and the gate is open all the same
	}
	if err != nil || string(value) != "30\n" {
		t.Fatalf("%s is %q, %v; want 30", file, value, err)
	}
	done := a.dialInBackground(addrPort(remote4(1), 80))
	test.Eventually(t, func() error {
		if drops, err := host.Drops(gate.holder); err != nil || drops < 9 {
			return fmt.Errorf("%d attempts, %w", drops, err)
		}
		return nil
	}, "nine attempts")
	a.startProxy()
	if got := <-done; got.err != nil {
		t.Errorf("dial: %v", got.err)
	}

	// What somebody has set higher stays.
	a.Do(func() { err = os.WriteFile(file, []byte("100"), 0) })
	other, openErr := n.OpenGate(a.key)
	if err := errors.Join(err, openErr); err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	a.Do(func() { value, err = os.ReadFile(file) })
	if err != nil || string(value) != "100\n" {
		t.Errorf("%s is %q, %v; want 100", file, value, err)
	}
}

// A gate that closes, as its process does when it is killed, lets what waits be
// refused at its next attempt. It never reaches another socket.
func TestGateThatClosesRefuses(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	gate, err := n.OpenGate(a.key)
	if err != nil {
		t.Fatal(err)
	}
	for i, uid := range []uint32{taskUID, 0} { // they are no proxy's
		a.serve(uid, a.taskCg, "tcp4", fmt.Sprintf("127.0.0.1:%d", 16000+i))
	}
	done := a.dialInBackground(addrPort(remote4(1), 80))
	eventuallyWaits(t, gate, 1)
	if err := gate.Close(); err != nil {
		t.Fatal(err)
	}
	if got := <-done; !errors.Is(got.err, unix.ECONNREFUSED) {
		t.Errorf("a connection that waited: %+v, %v; want it refused", got.answer, got.err)
	}
	a.remove()
	nothingLeft(t, n.Datapath)
}

// A gate is no listener: whoever asks whether the proxy listens is told that it does
// not. It comes back where its rows are lost, and goes with its allocation.
func TestGateIsNoListener(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	gate, err := n.OpenGate(a.key)
	if err != nil {
		t.Fatal(err)
	}
	seen, err := n.ObservedProxies([]uint64{a.Cookie()})
	if err != nil || slices.ContainsFunc(seen[a.Cookie()], func(p ObservedProxy) bool { return p.Listens }) {
		t.Errorf("proxies are %+v, %v; want that none listens", seen, err)
	}
	if e, err := n.Explain(a.key, explain.Connection{Destination: netip.AddrPortFrom(remote4(1), 80), UID: explain.NoUID}); err != nil || e.Verdict != bpfmap.RefusedNoProxy || !e.Held {
		t.Errorf("explained as %+v, %v; want that it is held", e, err)
	}
	n.edit(func(tables *bpfmap.Tables) error {
		return tables.Delete("listeners", bpfmap.GateKey(a.Cookie(), outboundPort, false))
	})
	if state, err := gate.Look(); err != nil || state.Listens {
		t.Errorf("gate is %+v, %v", state, err)
	}
	done := a.dialInBackground(addrPort(remote4(1), 80))
	eventuallyWaits(t, gate, 1)
	a.remove()
	nothingLeft(t, n.Datapath)
	if _, err := gate.Look(); !errors.Is(err, store.ErrUnknown) {
		t.Errorf("a look at the gate of an allocation that ended: %v", err)
	}
	if err := gate.Close(); err != nil {
		t.Error(err)
	}
	select {
	case got := <-done:
		if got.err == nil {
			t.Errorf("a connection of an allocation that ended was answered: %+v", got.answer)
		}
	case <-time.After(time.Minute):
		t.Error("a connection waits although its gate is gone")
	}
}

// A look at a gate at which nothing came opens neither the record nor the namespace:
// there may be a thousand of them.
func TestGateLooksAtLittle(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	gate, err := n.OpenGate(a.key)
	if err != nil {
		t.Fatal(err)
	}
	path := n.Paths().Record(a.key)
	record, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("?"), 0o600); err != nil {
		t.Fatal(err)
	}
	if state, err := gate.Look(); err != nil || state.Listens || len(state.Waiting) > 0 {
		t.Errorf("gate is %+v, %v; want that nothing waits, without a look at the record", state, err)
	}
	done := a.dialInBackground(addrPort(remote4(1), 80))
	test.Eventually(t, func() error {
		if _, err := gate.Look(); err == nil {
			return errors.New("the connection was not looked for")
		}
		return nil
	}, "a connection that waits to be looked for")
	if err := os.WriteFile(path, record, 0o600); err != nil {
		t.Fatal(err)
	}
	eventuallyWaits(t, gate, 1)
	if err := gate.Close(); err != nil {
		t.Error(err)
	}
	<-done
}

// What is dialled to the port of an explicit upstream waits until somebody listens
// there, in transparent mode and without, and by its virtual IP too. From then on
// the port is as any other.
func TestGateOfUpstreams(t *testing.T) {
	const port = 9191
	service := netip.MustParseAddr("240.0.0.5")
	for _, mode := range []workload.Mode{workload.ModeTransparent, workload.ModeDirect} {
		t.Run(string(mode), func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add(func(r *workload.Request) { r.Mode = mode })
			gate, err := n.OpenGate(a.key)
			if err != nil {
				t.Fatal(err)
			}
			if err := gate.Hold([]uint16{port, 9292}); err != nil {
				t.Fatal(err)
			}
			// A change of the rows lets it be.
			upstream := workload.Upstream{Name: "far", Addresses: []netip.Addr{service}, Listener: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)}
			if err := n.SetMeshConfig(a.key, workload.MeshConfig{InboundPort: inboundPort, Upstreams: []workload.Upstream{upstream}}); err != nil {
				t.Fatal(err)
			}
			dialled := []string{fmt.Sprintf("127.0.0.1:%d", port), addrPort(service, 80)}
			var waiting []<-chan asked
			for _, addr := range dialled {
				waiting = append(waiting, a.dialInBackground(addr))
			}
			eventuallyWaits(t, gate, len(waiting))
			for _, addr := range dialled {
				if e, err := n.Explain(a.key, explain.Connection{Destination: netip.MustParseAddrPort(addr), UID: explain.NoUID}); err != nil || !e.Held || e.Listens {
					t.Errorf("%s is explained as %+v, %v; want that it is held", addr, e, err)
				}
			}
			// Nobody else's port is held.
			if _, err := a.ask("tcp4", "127.0.0.1:9393"); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("dial of another port: %v, want it refused", err)
			}
			listener := a.serve(proxyUID, a.proxyCg, "tcp4", dialled[0])
			for i, done := range waiting {
				if got := <-done; got.err != nil {
					t.Errorf("a connection to %s that waited: %v", dialled[i], got.err)
				}
			}
			listener.Stop()
			for _, addr := range dialled {
				if _, err := a.ask("tcp4", addr); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("dial of %s when the listener stopped: %v, want it refused", addr, err)
				}
			}
			if err := gate.Hold([]uint16{port}); err != nil { // it had its listener
				t.Error(err)
			}
			if _, err := a.ask("tcp4", dialled[0]); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("dial after that: %v, want it refused", err)
			}
			if err := gate.Close(); err != nil {
				t.Error(err)
			}
			a.remove()
			nothingLeft(t, n.Datapath)
		})
	}
}

// A port on which somebody listens already is not held.
func TestGateOfAnUpstreamThatListens(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.serve(proxyUID, a.proxyCg, "tcp4", "127.0.0.1:9191")
	gate, err := n.OpenGate(a.key)
	if err != nil {
		t.Fatal(err)
	}
	defer gate.Close()
	if err := gate.Hold([]uint16{9191}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.ask("tcp4", "127.0.0.1:9191"); err != nil {
		t.Errorf("dial: %v", err)
	}
}
