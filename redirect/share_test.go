// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// everyPort are all ports, as one range of a job.
func everyPort() (ports []uint16) {
	for port := range 65535 {
		ports = append(ports, uint16(port+1))
	}
	return ports
}

func uids(count int) (list []uint32) {
	for i := range count {
		list = append(list, 5000+uint32(i))
	}
	return list
}

// edit opens the node's tables for a test.
func (n *node) edit(change func(tables *bpfmap.Tables) error) {
	n.t.Helper()
	tables, err := bpfmap.OpenTables(n.Paths().Maps())
	if err != nil {
		n.t.Fatal(err)
	}
	defer tables.Close()
	if err := change(tables); err != nil {
		n.t.Fatal(err)
	}
}

// others makes the programs believe that the workloads of the node hold so many
// indexes beside those that they do.
func (n *node) others(held uint32) {
	n.t.Helper()
	n.edit(func(tables *bpfmap.Tables) error {
		return tables.Put("index_totals", uint32(bpfmap.IndexesFreed), -held, ebpf.UpdateAny)
	})
}

// A range of ports costs rows by its width, not a row for each port, so that no
// number of jobs with ranges keeps a neighbour's ADD from its rows.
func TestPortRangesLeaveRoom(t *testing.T) {
	n := newNode(t)
	for range 3 {
		n.newAlloc().add(func(r *workload.Request) { r.ExcludeInboundPorts, r.ExcludeOutboundPorts = everyPort(), everyPort() })
	}
	if got := rowCounts(t, n.Datapath)["ports"]; got != 3*2*64 {
		t.Errorf("%d rows for all ports of three workloads, want 64 for each direction", got)
	}
	b := n.newAlloc()
	b.add(func(r *workload.Request) { r.ExcludeOutboundPorts = []uint16{8080} })
	test.Echo(t, n.remote, "tcp", "[::]:8080")
	b.startProxy()
	if moved := b.rose(func() { _, _ = b.ask("tcp4", addrPort(remote4(b.number), 8080)) }); moved[bpfmap.PortExcluded] != 1 {
		t.Errorf("verdicts %v, want one %s", moved, bpfmap.PortExcluded)
	}
	n.healthy()
}

// Whatever others hold, a workload gets its first destinations; one that holds
// more than its share gets no new one while the node's table is nearly full.
func TestFirstDestinationsFindRoom(t *testing.T) {
	n := newNode(t)
	greedy, quiet := n.newAlloc(), n.newAlloc()
	greedy.add()
	quiet.add()
	greedy.startProxy()
	quiet.startProxy()
	const many = 300
	first := netip.MustParseAddr("20.1.0.0")
	if refused := greedy.knock(first, many); len(refused) > 0 {
		t.Fatalf("refused: %v", refused)
	}
	const mark = bpfmap.DefaultOrigins / 8 * 7
	n.others(mark - many - 1)
	moved := greedy.rose(func() {
		if refused := greedy.knock(netip.MustParseAddr("20.2.0.0"), 10); refused[unix.ENETUNREACH] != 9 {
			t.Errorf("refused: %v, want 9 of 10: there was room for one", refused)
		}
	})
	if moved[bpfmap.RefusedShare] != 9 || moved[bpfmap.Redirected] != 1 {
		t.Errorf("verdicts %v, want 9 %s", moved, bpfmap.RefusedShare)
	}
	// What it knows goes on.
	if refused := greedy.knock(first, many); len(refused) > 0 {
		t.Errorf("known destinations are refused: %v", refused)
	}
	n.ails("table origins is 87 % full")
	late := n.newAlloc()
	late.add()
	late.startProxy()
	for _, a := range []*alloc{quiet, late} {
		if refused := a.knock(netip.MustParseAddr("20.3.0.0"), bpfmap.OriginShare); len(refused) > 0 {
			t.Errorf("allocation %d: of its first %d destinations are refused: %v", a.number, bpfmap.OriginShare, refused)
		}
		if refused := a.knock(netip.MustParseAddr("20.4.0.0"), 1); refused[unix.ENETUNREACH] != 1 {
			t.Errorf("allocation %d: one more than its share: %v, want it refused", a.number, refused)
		}
	}
	// The count was wrong, as after a process that died between two writes: the collector sees that.
	if _, err := n.NewIndexReclaimer().Run(); err != nil {
		t.Fatal(err)
	}
	if refused := greedy.knock(netip.MustParseAddr("20.2.0.0"), 10); len(refused) > 0 {
		t.Errorf("refused when there is room again: %v", refused)
	}
	n.healthy()
}

// Many rows of others leave some for an ADD that asks for few.
func TestAddFindsRows(t *testing.T) {
	n := newNode(t)
	big := n.newAlloc()
	big.add(func(r *workload.Request) { r.ExcludeUIDs = uids(workload.MaxRows) })
	const rows = 32768
	const mark = rows / 6 * 5
	filler := workload.Workload{OutboundPort: 1, ExcludeUIDs: uids(mark - workload.MaxRows)}
	n.edit(func(tables *bpfmap.Tables) error { return tables.WriteRows(1<<60, filler, false) })

	refused := n.newAlloc()
	request := refused.request()
	request.ExcludeUIDs = uids(bpfmap.RowShare + 1)
	err := n.Add(Attachment{Key: refused.key, NetNS: refused.Path, Request: request})
	if !errors.Is(err, workload.ErrFull) || !strings.Contains(fmt.Sprint(err), fmt.Sprintf("write map exclusions: table is full: %d of its %d rows are taken; this workload asks for 65", mark, rows)) {
		t.Errorf("ADD of more than a share: %v", err)
	}
	small := n.newAlloc()
	small.add(func(r *workload.Request) { r.ExcludeUIDs = uids(bpfmap.RowShare) })
	small.startProxy()
	small.works()
	// What a workload has is its own.
	if err := n.SetMeshConfig(big.key, workload.MeshConfig{InboundPort: 20001}); err != nil {
		t.Errorf("change of a workload with many rows: %v", err)
	}
	n.ails("table exclusions is 83 % full")
	n.edit(func(tables *bpfmap.Tables) error { return tables.DeleteWorkload(1<<60, &filler) })
	if err := n.Add(Attachment{Key: refused.key, NetNS: refused.Path, Request: request}); err != nil {
		t.Errorf("ADD where there is room again: %v", err)
	}
}

// A workload has a limit of its own in each table, and an ADD beyond it says so.
func TestAddOfTooManyRows(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	for name, edit := range map[string]func(*workload.Request){
		"excluded UIDs: table is full: these are 4097, a workload has at most 4096": func(r *workload.Request) { r.ExcludeUIDs = uids(workload.MaxRows + 1) },
		"excluded CIDRs: table is full: these are 4097, a workload has at most 4096": func(r *workload.Request) {
			for i := range workload.MaxRows + 1 {
				r.ExcludeOutboundCIDRs = append(r.ExcludeOutboundCIDRs, netip.PrefixFrom(netip.AddrFrom4([4]byte{11, byte(i >> 8), byte(i)}), 32))
			}
		},
		"addresses and virtual IPs: table is full: these are 4097, a workload has at most 4096": func(r *workload.Request) {
			for i := range workload.MaxRows + 1 {
				r.Addresses = append(r.Addresses, netip.AddrFrom4([4]byte{11, 1, byte(i >> 8), byte(i)}))
			}
			r.Addresses = r.Addresses[len(r.Addresses)-workload.MaxRows-1:]
		},
	} {
		request := a.request()
		edit(&request)
		err := n.Add(Attachment{Key: a.key, NetNS: a.Path, Request: request})
		if !errors.Is(err, workload.ErrFull) || !strings.Contains(fmt.Sprint(err), name) {
			t.Errorf("ADD: %v, want %q", err, name)
		}
	}
	a.add(func(r *workload.Request) { r.ExcludeUIDs = uids(workload.MaxRows) })
}

// The DEL of a workload with very many destinations removes them all, lets
// others have the lock in between, and can be finished by another process.
func TestRemoveOfManyDestinations(t *testing.T) {
	for name, next := range map[string]uint32{"counted": 0, "walked": 1 << 18} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			stays := n.newAlloc()
			stays.add()
			stays.startProxy()
			stays.knock(netip.MustParseAddr("20.9.0.0"), 7)
			empty := rowCounts(t, n.Datapath)
			a := n.newAlloc()
			many := 5 * bpfmap.SliceRows
			fill := func() {
				t.Helper()
				a.add()
				if a.outbound == nil { // else its listeners are there, and ADD registers them
					a.startProxy()
				}
				if next != 0 {
					a.setNextIndex(next)
				}
				if refused := a.knock(netip.MustParseAddr("20.1.0.0"), many); len(refused) > 0 {
					t.Fatalf("refused: %v", refused)
				}
			}
			gone := func() {
				t.Helper()
				if diff := cmp.Diff(empty, rowCounts(t, n.Datapath)); diff != "" {
					t.Errorf("rows (-want +got):\n%s", diff)
				}
				n.edit(func(tables *bpfmap.Tables) error {
					if held, err := tables.HeldByNode(); err != nil || held != 7 {
						t.Errorf("the node holds %d indexes, %v, want 7", held, err)
					}
					return nil
				})
			}
			fill()
			between := n.lockedWhile(func() error { return n.Remove(a.key) })
			gone()
			if len(between) < 2 {
				t.Errorf("another got the lock in %d places half way, want it between the slices", len(between))
			}

			// A process that dies after the first slice; the namespace comes again before the rest went.
			fill()
			n.edit(func(tables *bpfmap.Tables) error { return tables.DeleteWorkload(a.Cookie(), nil) })
			fill()
			a.works()
			n.edit(func(tables *bpfmap.Tables) error { return tables.DeleteWorkload(a.Cookie(), nil) })
			if err := n.eraseDead(); err != nil {
				t.Fatal(err)
			}
			if err := n.Remove(a.key); err != nil {
				t.Fatal(err)
			}
			gone()
		})
	}
}

// lockedWhile returns what the node held at the times that another got its lock
// while action was half way.
func (n *node) lockedWhile(action func() error) (half map[uint32]bool) {
	n.t.Helper()
	tables, err := bpfmap.OpenTables(n.Paths().Maps())
	if err != nil {
		n.t.Fatal(err)
	}
	defer tables.Close()
	before, err := tables.HeldByNode()
	if err != nil {
		n.t.Fatal(err)
	}
	var end atomic.Bool
	done := make(chan map[uint32]bool)
	go func() {
		seen := make(map[uint32]bool)
		for !end.Load() {
			err := n.Locked(func() error {
				held, err := tables.HeldByNode()
				seen[held] = true
				return err
			})
			if err != nil {
				n.t.Error(err)
			}
		}
		done <- seen
	}()
	err = action()
	end.Store(true)
	half = <-done
	if err != nil {
		n.t.Fatal(err)
	}
	after, err := tables.HeldByNode()
	if err != nil {
		n.t.Fatal(err)
	}
	delete(half, before)
	delete(half, after)
	return half
}

// The collector finds what a former one left half way, and works in slices.
func TestCollectorGoesOn(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	many := 4 * bpfmap.SliceRows
	a.add(func(r *workload.Request) { r.Budget = uint32(many) })
	a.startProxy()
	if refused := a.knock(netip.MustParseAddr("20.1.0.0"), many); len(refused) > 0 {
		t.Fatalf("refused: %v", refused)
	}
	if refused := a.knock(netip.MustParseAddr("20.2.0.0"), 1); len(refused) != 1 {
		t.Fatal("there is room beyond the budget")
	}
	cookie := a.Cookie()
	first := n.NewIndexReclaimer()
	first.IdleAfter, first.FreeAfter = 0, 0
	if freed, err := first.Run(); err != nil || freed != 0 {
		t.Fatalf("first run: %d freed, %v", freed, err)
	}
	if got := len(first.pendingFree); got != many/2 {
		t.Errorf("%d indexes are pending, want half of %d", got, many)
	}
	second := n.NewIndexReclaimer() // the first one died
	second.IdleAfter, second.FreeAfter = 0, 0
	between := n.lockedWhile(func() error {
		freed, err := second.Run()
		if freed != many/2 {
			t.Errorf("second run: %d freed, want %d", freed, many/2)
		}
		return err
	})
	if len(between) < 1 {
		t.Errorf("another got the lock in %d places half way, want it between the slices", len(between))
	}
	n.edit(func(tables *bpfmap.Tables) error {
		held, err := tables.Held(cookie)
		node, nodeErr := tables.HeldByNode()
		if held != uint32(many/2) || node != held {
			t.Errorf("the workload holds %d, the node %d, want %d", held, node, many/2)
		}
		return errors.Join(err, nodeErr)
	})
	if refused := a.knock(netip.MustParseAddr("20.2.0.0"), many/2); len(refused) > 0 {
		t.Errorf("refused: %v", refused)
	}
}
