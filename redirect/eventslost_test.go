// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/monitor"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// knock begins a connection to each of count addresses from first on and waits
// for none: as many destinations as a task can dial in a moment. It returns how
// many were refused at once, by error.
func (a *alloc) knock(first netip.Addr, count int) map[error]int {
	a.node.t.Helper()
	refused := make(map[error]int)
	bytes := first.As4()
	base := binary.BigEndian.Uint32(bytes[:])
	a.Do(func() {
		for i := range uint32(count) {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				a.node.t.Fatalf("open socket: %v", err)
			}
			addr := &unix.SockaddrInet4{Port: 9}
			binary.BigEndian.PutUint32(addr.Addr[:], base+i)
			err = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
			if err != nil {
				a.node.t.Fatalf("set linger: %v", err)
			}
			if err := unix.Connect(fd, addr); err != nil && !errors.Is(err, unix.EINPROGRESS) {
				refused[err]++
			}
			unix.Close(fd)
		}
	})
	return refused
}

// A reader that stands still while one workload floods it gets every event of
// the quiet one, and is told of every event that it does not get.
func TestEventsShareTheRing(t *testing.T) {
	n := newNode(t)
	noisy, quiet := n.newAlloc(), n.newAlloc()
	noisy.add()
	quiet.add()
	flood := max(test.Scale(20000), 10000) // more than the ring holds
	const few = 100

	release := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	done := make(chan error, 1)
	seen, lost := make(map[uint64]uint64), make(map[uint64]uint64)
	former := n.lease()
	go func() {
		done <- n.Events(ctx, func(event monitor.Event) error {
			<-release
			if event.Verdict == bpfmap.EventsLost {
				lost[event.Cookie] += event.Lost
			} else {
				seen[event.Cookie]++
			}
			return nil
		})
	}()
	test.Eventually(t, func() error {
		if n.lease() <= former {
			return errors.New("the reader has not begun")
		}
		return nil
	}, "a lease of the reader's own")

	noisy.knock(netip.MustParseAddr("20.1.0.0"), flood)
	quiet.knock(netip.MustParseAddr("20.2.0.0"), few)
	noisy.knock(netip.MustParseAddr("20.1.0.0"), flood)
	cancel()
	close(release)
	if err := <-done; err != nil {
		t.Fatalf("events: %v", err)
	}

	// No proxy runs: each connection is refused where it is dialled.
	total := func(a *alloc) (total uint64) {
		for _, count := range a.counts() {
			total += count
		}
		return total
	}
	if got := seen[quiet.Cookie()]; got != few || lost[quiet.Cookie()] != 0 {
		t.Errorf("%d events of the quiet workload came and %d were lost, want all %d", got, lost[quiet.Cookie()], few)
	}
	if got, want := seen[noisy.Cookie()]+lost[noisy.Cookie()], total(noisy); got != want || lost[noisy.Cookie()] == 0 {
		t.Errorf("of the noisy workload %d events came and %d were lost, %d together: want %d, not all of them",
			seen[noisy.Cookie()], lost[noisy.Cookie()], got, want)
	}
	for _, w := range countsOf(t, n) {
		if w.EventsLost != lost[w.Cookie] {
			t.Errorf("workload %s: %d events were lost, the reader was told of %d", w.Key, w.EventsLost, lost[w.Cookie])
		}
	}
}

func countsOf(t *testing.T, n *node) []inspect.WorkloadVerdicts {
	t.Helper()
	list, err := n.Verdicts()
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// What a former reader lost is not told to the next one.
func TestEventsLostBeforeTheReaderBegan(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	tables, err := bpfmap.OpenTables(n.Paths().Maps())
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	if err := tables.Lease(1); err != nil { // a reader that died long ago
		t.Fatal(err)
	}
	a.knock(netip.MustParseAddr("20.1.0.0"), 10)
	if got := countsOf(t, n)[0].EventsLost; got != 10 {
		t.Errorf("%d events were lost, want 10", got)
	}
	reader := n.readEvents()
	marker := netip.MustParseAddrPort("203.0.113.1:1")
	if _, err := a.ask("tcp4", marker.String()); err == nil {
		t.Fatal("there is a proxy")
	}
	if got := reader.until(marker); len(got) > 0 {
		t.Errorf("events from before the reader began: %+v", got)
	}
	reader.end()
}
