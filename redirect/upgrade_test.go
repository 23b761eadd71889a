// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/program/filter"
	"github.com/weirmesh/weir/test"
)

// neighbour is a program of somebody else on one of Weir's hooks. It lets every
// connection pass and counts them.
type neighbour struct {
	link    link.Link
	counter *ebpf.Map
}

func attachNeighbour(t *testing.T) *neighbour {
	t.Helper()
	counter, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { counter.Close() })
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "neighbour", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{
			asm.StoreImm(asm.RFP, -4, 0, asm.Word),
			asm.LoadMapPtr(asm.R1, counter.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "out"),
			asm.Mov.Imm(asm.R1, 1),
			asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
			asm.Mov.Imm(asm.R0, 1).WithSymbol("out"),
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatalf("load neighbour: %v", err)
	}
	defer prog.Close()
	attached, err := link.AttachCgroup(link.CgroupOptions{
		Path: test.CgroupRoot(t), Attach: ebpf.AttachCGroupInet4Connect, Program: prog,
	})
	if err != nil {
		t.Fatalf("attach neighbour: %v", err)
	}
	t.Cleanup(func() { attached.Close() })
	return &neighbour{link: attached, counter: counter}
}

// runs fails the test unless the program is attached and sees a connection that
// dial makes.
func (n *neighbour) runs(t *testing.T, when string, dial func()) {
	t.Helper()
	root, err := os.Open(test.CgroupRoot(t))
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	attached, err := link.QueryPrograms(link.QueryOptions{Target: int(root.Fd()), Attach: ebpf.AttachCGroupInet4Connect})
	if err != nil {
		t.Fatal(err)
	}
	info, err := n.link.Info()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(attached.Programs, func(p link.AttachedProgram) bool { return p.ID == info.Program }) {
		t.Errorf("%s: the neighbour is not attached any more", when)
	}
	var before, after uint64
	if err := n.counter.Lookup(uint32(0), &before); err != nil {
		t.Fatal(err)
	}
	dial()
	if err := n.counter.Lookup(uint32(0), &after); err != nil {
		t.Fatal(err)
	}
	if after == before {
		t.Errorf("%s: the neighbour did not see a connection", when)
	}
}

func TestForeignProgramsOnTheSameHooksStay(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	first := attachNeighbour(t)
	n := newNode(t)
	second := attachNeighbour(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	stay := func(when string) {
		t.Helper()
		for _, neighbour := range []*neighbour{first, second} {
			// Whether somebody answers is not asked here: the program runs before.
			neighbour.runs(t, when, func() { _, _ = test.Ask(a.NetNS, "tcp4", addrPort(remote4(1), 80)) })
		}
	}
	stay("after load")
	a.works()
	staleDigest(t, n.Datapath)
	if _, err := n.Load(); err != nil {
		t.Fatal(err)
	}
	stay("after an upgrade")
	detachPinned(t, n.Paths().Link("weir_connect4"))
	if _, err := n.Load(); err != nil {
		t.Fatal(err)
	}
	stay("after a repair")
	a.works()
	if _, err := n.Unload(); err != nil {
		t.Fatal(err)
	}
	stay("after unload")
}

// staleDigest makes the node look as if it ran the programs of another version.
func staleDigest(t *testing.T, d *Datapath) {
	t.Helper()
	editControl(t, d, func(row *bpfmap.BpfControl) { row.Digest[0]++ })
}

// editControl changes the node's own row.
func editControl(t *testing.T, d *Datapath, edit func(*bpfmap.BpfControl)) {
	t.Helper()
	tables, err := bpfmap.OpenTables(d.Paths().Maps())
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	var row bpfmap.BpfControl
	if _, err := tables.Get("control", uint32(0), &row); err != nil {
		t.Fatal(err)
	}
	edit(&row)
	if err := tables.Put("control", uint32(0), row, ebpf.UpdateAny); err != nil {
		t.Fatal(err)
	}
}

func TestUpgradeUnderLoad(t *testing.T) {
	n := newNode(t)
	a, b := n.newAlloc(), n.newAlloc()
	for _, alloc := range []*alloc{a, b} {
		alloc.add()
		alloc.startProxy()
	}
	// Whoever gets past the proxy is seen here.
	test.Echo(t, n.remote, "tcp", "[::]:4321")
	test.Echo(t, a.NetNS, "tcp", "[::]:4321")

	var stop atomic.Bool
	var connections atomic.Int64
	var load sync.WaitGroup
	keep := func(ask func() (test.Answer, error), server string) {
		load.Go(func() {
			for !stop.Load() && !t.Failed() {
				answer, err := ask()
				if err != nil || answer.Server != server {
					t.Errorf("during the upgrades: %+v, %v; want an answer of %s", answer, err, server)
				}
				connections.Add(1)
			}
		})
	}
	for _, addr := range []string{addrPort(remote4(1), 4321), addrPort(remote6(1), 4321)} {
		client := test.NewClient(t, test.Spec{NetNS: a.NetNS, Cgroup: a.taskCg, UID: taskUID, GID: taskUID})
		keep(func() (test.Answer, error) { return client.Ask("tcp", addr) }, a.outbound.Name)
	}
	outside := test.NewClient(t, test.Spec{NetNS: n.remote})
	keep(func() (test.Answer, error) { return outside.Ask("tcp", addrPort(a.v4, 4321)) }, a.inbound.Name)

	upgrades := test.Scale(20)
	for i := range upgrades {
		staleDigest(t, n.Datapath)
		if status, err := n.Status(); err != nil || status.Current {
			t.Fatalf("status before upgrade %d: current %t, %v", i, status.Current, err)
		}
		links, lookup := pinnedLinks(t, n.Datapath), linkIDs(t, n.Paths().Lookup(a.Cookie()))
		seen := connections.Load()
		result, err := n.Load()
		if err != nil {
			t.Fatal(err)
		}
		if want := len(program.ProgramNames()) + 2; !result.Changed || len(result.Did) != want {
			t.Errorf("upgrade %d did %q, want %d steps", i, result.Did, want)
		}
		for name, now := range pinnedLinks(t, n.Datapath) {
			if now[0] != links[name][0] || now[1] == links[name][1] {
				t.Errorf("upgrade %d: %s is link %d with program %d, was %d; want the same link, a new program",
					i, name, now[0], now[1], links[name])
			}
		}
		if now := linkIDs(t, n.Paths().Lookup(a.Cookie())); now[0] != lookup[0] || now[1] == lookup[1] {
			t.Errorf("upgrade %d: lookup is link and program %d, was %d", i, now, lookup)
		}
		test.Eventually(t, func() error {
			if connections.Load() == seen {
				return fmt.Errorf("no connection since upgrade %d", i)
			}
			return nil
		}, "connections between upgrades")
	}
	stop.Store(true)
	load.Wait()
	t.Logf("%d connections during %d upgrades", connections.Load(), upgrades)
	healthy(t, n.Datapath)
	b.works()
	// The old programs are gone, not only out of the way.
	held := kernelObjects(t, n.Datapath)
	held.settle(t, [3]int{len(held.maps), len(program.ProgramNames()) + len(filter.FilterNames()) + 3, len(program.ProgramNames()) + 2})
	counts := a.counts()
	for verdict := range counts {
		if verdict != bpfmap.Redirected && verdict != bpfmap.Inbound && verdict != bpfmap.Listener {
			t.Errorf("verdict %s was counted %d times", verdict, counts[verdict])
		}
	}
}

// An older plugin that repairs the links of a newer node leaves its version:
// only Load, the operator's and the agent's own act, upgrades.
func TestCheckDoesNotUpgrade(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	staleDigest(t, n.Datapath)
	links := pinnedLinks(t, n.Datapath)
	repaired, err := n.Check(a.key, a.Path)
	if err != nil || len(repaired) != 0 {
		t.Errorf("check: repaired %q, %v; want nothing", repaired, err)
	}
	for name, now := range pinnedLinks(t, n.Datapath) {
		if now != links[name] {
			t.Errorf("check swapped %s", name)
		}
	}
	detachPinned(t, n.Paths().Link("weir_bind6"))
	if _, err := n.Check(a.key, a.Path); err != nil {
		t.Fatal(err)
	}
	for name, now := range pinnedLinks(t, n.Datapath) {
		if name != "weir_bind6" && now != links[name] {
			t.Errorf("check swapped %s, which was in force", name)
		}
	}
	if status, err := n.Status(); err != nil || status.Current {
		t.Errorf("status after check: current %t, %v; want another version still", status.Current, err)
	}
	a.works()
}
