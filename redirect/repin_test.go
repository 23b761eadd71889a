// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/test"
)

func TestMapNamesAreThoseOfTheObject(t *testing.T) {
	spec, err := bpfmap.LoadBpf()
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for name := range spec.Maps {
		want = append(want, name)
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, bpfmap.MapNames()); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
}

// A kernel that compiles no programs any more takes no allocation, by name; those that are
// there go on.
func TestCompilerIsSwitchedOff(t *testing.T) {
	n := newNode(t)
	a, b := n.newAlloc(), n.newAlloc()
	a.add()
	a.startProxy()
	a.works()
	set := func(value string) error {
		return os.WriteFile("/proc/sys/net/core/bpf_jit_enable", []byte(value), 0o644)
	}
	if err := set("0"); err != nil {
		t.Logf("this kernel always compiles: %v", err)
		return
	}
	err := n.Add(Attachment{Key: b.key, NetNS: b.Path, Request: b.request()})
	if err == nil || !strings.Contains(err.Error(), "set net.core.bpf_jit_enable to 1") {
		t.Errorf("ADD: %v, want the key named", err)
	}
	a.works()
	if err := os.RemoveAll(n.Paths().Calls()); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Repair(); err == nil || !strings.Contains(err.Error(), "set net.core.bpf_jit_enable to 1") {
		t.Errorf("repair: %v, want the key named", err)
	}
	if err := set("1"); err != nil {
		t.Fatal(err)
	}
	b.add()
	b.startProxy()
	b.works()
	a.works()
	healthy(t, n.Datapath)
}

// A namespace's program does not tell the verifier which entry it calls. Of a constant one
// the kernel makes a direct jump, for which it keeps all callers of a table in one list: an
// ADD and a DEL walk through it, and a change of the entry patches each of them.
func TestLookupCallsNoConstantEntry(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	info, err := programOf(t, n.Paths().Lookup(a.Cookie())).Info()
	if err != nil {
		t.Fatal(err)
	}
	code, err := info.Instructions()
	if err != nil {
		t.Fatal(err)
	}
	call := slices.IndexFunc(code, func(i asm.Instruction) bool { return i.IsBuiltinCall() && i.Constant == int64(asm.FnTailCall) })
	if call < 0 {
		t.Fatalf("it makes no tail call:\n%v", code)
	}
	var entry []asm.OpCode
	for _, i := range code[:call] {
		if i.Dst == asm.R3 {
			entry = append(entry, i.OpCode)
		}
	}
	want := []asm.OpCode{asm.LoadMemOp(asm.DWord), asm.RSh.Op(asm.ImmSource)}
	if diff := cmp.Diff(want, entry); diff != "" {
		t.Errorf("how it comes to the number of the entry (-want +got):\n%s", diff)
	}
}

// The lookup program goes with the pins that lead to it: what it would judge is refused, the
// status says so, and the next look at the node makes it anew.
func TestRepairMakesTheLookupProgramAnew(t *testing.T) {
	for _, lost := range [][]string{program.CallNames(), program.CallNames()[:1], program.CallNames()[1:]} {
		t.Run(strings.Join(lost, " and "), func(t *testing.T) {
			n := newNode(t)
			a, b := n.newAlloc(), n.newAlloc()
			for _, alloc := range []*alloc{a, b} {
				alloc.add()
				alloc.startProxy()
				alloc.works()
			}
			before := kernelObjects(t, n.Datapath).counts()
			for _, name := range lost {
				if err := os.Remove(filepath.Join(n.Paths().Calls(), name)); err != nil {
					t.Fatal(err)
				}
			}
			status, err := n.Status()
			if err != nil || !slices.ContainsFunc(status.Problems, func(p health.Problem) bool {
				return p.Code == health.ProblemProgramDetached.String() && strings.Contains(p.What, "2 workloads")
			}) {
				t.Errorf("status: %+v, %v; want the lookup program missed", status.Problems, err)
			}
			if slices.Contains(lost, "lookup_calls") {
				test.Eventually(t, func() error { // the kernel empties the table a moment later
					if answer, err := a.ask("tcp4", "198.18.0.1:80"); err == nil {
						return fmt.Errorf("dialled without the lookup program: %+v", answer)
					}
					return nil
				}, "connections to be refused")
			}
			want := program.Repair{Kind: program.PinPutBack, Object: "weir_decide, which the programs of 2 namespaces call"}
			if repairs, err := n.Repair(); err != nil || !did(repairs, want) {
				t.Errorf("repair = %q, %v; want the lookup program made anew", repairs, err)
			}
			healthy(t, n.Datapath)
			a.works()
			b.works()
			held := kernelObjects(t, n.Datapath)
			held.settle(t, before)
			if repairs, err := n.Repair(); err != nil || len(repairs) > 0 {
				t.Errorf("repair again = %q, %v; want nothing done", repairs, err)
			}
		})
	}
}

// A pin that somebody removed comes back with the table and its rows: a fresh
// table would give indexes a second time that open connections carry.
func TestRepairPutsBackPinsOfMaps(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	a.works()
	before := kernelObjects(t, n.Datapath)
	rows := rowCounts(t, n.Datapath)
	for _, name := range bpfmap.MapNames() {
		if name == "control" { // without it the node is not loaded
			continue
		}
		if err := os.Remove(filepath.Join(n.Paths().Maps(), name)); err != nil {
			t.Fatal(err)
		}
	}
	repairs, err := n.Repair()
	if err != nil || !did(repairs, program.Repair{Kind: program.PinPutBack, Object: "map origins"}) {
		t.Fatalf("repair = %q, %v; want the pins put back", repairs, err)
	}
	if diff := cmp.Diff(before.maps, kernelObjects(t, n.Datapath).maps); diff != "" {
		t.Errorf("other tables are pinned (-before +after):\n%s", diff)
	}
	if diff := cmp.Diff(rows, rowCounts(t, n.Datapath)); diff != "" {
		t.Errorf("rows (-before +after):\n%s", diff)
	}
	if repairs, err := n.Repair(); err != nil || len(repairs) > 0 {
		t.Errorf("repair again = %q, %v; want nothing done", repairs, err)
	}
	a.works()
}
