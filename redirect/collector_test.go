// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// TestCollector drives one workload through ten times its budget of
// destinations while long-lived connections stay open: no refusal, no wrong
// origin, and the indexes of open connections are never given to another.
func TestCollector(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	budget := uint32(test.Scale(512))
	if budget < 64 {
		budget = 64
	}
	a.add(func(r *workload.Request) { r.Budget = budget })
	a.startProxy()
	collector := n.NewIndexReclaimer()
	collector.IdleAfter, collector.FreeAfter = 0, 0

	long := make(map[netip.AddrPort]*net.TCPConn)
	for i := range byte(10) {
		origin := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, i + 1}), 80)
		long[origin] = a.open(origin)
	}

	// The next new indexes end a lap of the range, and those of the long-lived
	// connections come up again.
	a.setNextIndex(workload.MaxBudget - budget)

	freed := 0
	for i := range 10 * budget {
		origin := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, byte(i >> 16), byte(i >> 8), byte(i)}), 8080)
		if got := a.originOfReset(origin); got != origin {
			t.Fatalf("dial %s: the proxy saw origin %s", origin, got)
		}
		if i%(budget/8) != 0 {
			continue
		}
		count, err := collector.Run()
		if err != nil {
			t.Fatal(err)
		}
		freed += count
	}
	if freed == 0 {
		t.Error("the collector gave back nothing")
	}
	workloads, err := n.Workloads()
	if err != nil {
		t.Fatal(err)
	}
	if held := workloads[0].Origins; held > budget {
		t.Errorf("the workload holds %d origins, its budget is %d", held, budget)
	}
	counts := a.counts()
	if counts[bpfmap.RefusedBudget]+counts[bpfmap.RefusedTable] > 0 {
		t.Errorf("verdicts: %v, want no refusal", counts)
	}
	// What a socket carries is still its own.
	for origin, conn := range long {
		a.carries(conn, origin)
		again, err := a.ask("tcp4", origin.String())
		a.answered(again, err, origin, a.v4)
	}
}

// open dials and returns the connection, which ends with the test.
func (a *alloc) open(origin netip.AddrPort) *net.TCPConn {
	a.node.t.Helper()
	var conn net.Conn
	var err error
	a.Do(func() { conn, err = net.Dial("tcp4", origin.String()) })
	if err != nil {
		a.node.t.Fatalf("dial %s: %v", origin, err)
	}
	a.node.t.Cleanup(func() { conn.Close() })
	var reply test.Reply
	if err := json.NewDecoder(conn).Decode(&reply); err != nil || reply.Origin != origin {
		a.node.t.Fatalf("dial %s: the proxy saw origin %s, %v", origin, reply.Origin, err)
	}
	return conn.(*net.TCPConn)
}

// carries holds what both ends are told of an open connection now against where
// it was dialled.
func (a *alloc) carries(conn *net.TCPConn, origin netip.AddrPort) {
	a.node.t.Helper()
	if now, err := test.AskAgain(conn); err != nil || now.Origin != origin || now.To != origin {
		a.node.t.Errorf("a connection to %s has origin %s for the proxy and peer %s for the task, %v", origin, now.Origin, now.To, err)
	}
}

// setNextIndex moves the workload as if it had been given that many indexes.
func (a *alloc) setNextIndex(next uint32) {
	a.node.t.Helper()
	tables, err := bpfmap.OpenTables(a.node.Paths().Maps())
	if err != nil {
		a.node.t.Fatal(err)
	}
	defer tables.Close()
	cookie := a.Cookie()
	var row bpfmap.BpfBudget
	if _, err := tables.Get("budgets", cookie, &row); err != nil {
		a.node.t.Fatal(err)
	}
	row.Next = next
	if err := tables.Put("budgets", cookie, row, ebpf.UpdateAny); err != nil {
		a.node.t.Fatal(err)
	}
}

// originOfReset dials as a task and returns the origin that the proxy saw. It
// ends the connection by a reset: TIME_WAIT would carry the index for a minute.
func (a *alloc) originOfReset(origin netip.AddrPort) netip.AddrPort {
	a.node.t.Helper()
	var conn net.Conn
	var err error
	a.Do(func() { conn, err = net.Dial("tcp4", origin.String()) })
	if err != nil {
		a.node.t.Fatalf("dial %s: %v", origin, err)
	}
	defer conn.Close()
	if err := conn.(*net.TCPConn).SetLinger(0); err != nil {
		a.node.t.Fatal(err)
	}
	var reply test.Reply
	if err := json.NewDecoder(conn).Decode(&reply); err != nil {
		a.node.t.Fatalf("read the proxy's reply: %v", err)
	}
	return reply.Origin
}

// TestCollectorKeepsWhatASocketCarries closes one of two connections and sees
// that one's index come back, and no other.
func TestCollectorKeepsWhatASocketCarries(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) { r.Budget = 2 })
	a.startProxy()
	first := netip.MustParseAddrPort("192.0.2.1:80")
	open := a.open(first)
	a.originOfReset(netip.MustParseAddrPort("192.0.2.2:80"))
	if _, err := a.ask("tcp4", "192.0.2.3:80"); err == nil {
		t.Fatal("a third destination was taken, the budget is 2")
	}
	collector := n.NewIndexReclaimer()
	collector.IdleAfter, collector.FreeAfter = 0, time.Nanosecond
	total := 0
	test.Eventually(t, func() error {
		freed, err := collector.Run()
		total += freed
		if err == nil && total == 0 {
			err = fmt.Errorf("nothing given back yet")
		}
		return err
	}, "the index of the closed connection to come back")
	if total != 1 {
		t.Errorf("%d indexes came back, want that of the closed connection alone", total)
	}
	origin := netip.MustParseAddrPort("192.0.2.3:80")
	answer, err := a.ask("tcp4", origin.String())
	a.answered(answer, err, origin, a.v4)
	a.carries(open, first)
}
