// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/test"
)

// fillSpares fills the directory and returns the IDs of the programs by their pins.
func fillSpares(t *testing.T, d *Datapath) map[string]uint32 {
	t.Helper()
	if _, err := d.FillSpares(); err != nil {
		t.Fatal(err)
	}
	return spareIDs(t, d)
}

func spareIDs(t *testing.T, d *Datapath) map[string]uint32 {
	t.Helper()
	entries, err := os.ReadDir(d.Paths().Spares())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	ids := make(map[string]uint32)
	for _, entry := range entries {
		path := filepath.Join(d.Paths().Spares(), entry.Name())
		prog, err := program.OpenProgram(path)
		if err != nil {
			t.Fatal(err)
		}
		ids[path] = uint32(programID(t, prog))
		prog.Close()
	}
	return ids
}

// attachedID is the program that the allocation has.
func (a *alloc) attachedID(t *testing.T) uint32 {
	t.Helper()
	return linkIDs(t, a.node.Paths().Lookup(a.Cookie()))[1]
}

// loadSpare loads a program over the tables of a node, which nobody has pinned.
func loadSpare(t *testing.T, d *Datapath) *ebpf.Program {
	t.Helper()
	tables, err := bpfmap.OpenTables(d.Paths().Maps())
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	prog, err := program.LoadSpare(tables)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { prog.Close() })
	return prog
}

func TestAddTakesASpare(t *testing.T) {
	n := newNode(t)
	spares := fillSpares(t, n.Datapath)
	if filled, err := n.FillSpares(); err != nil || filled != 0 || len(spares) == 0 {
		t.Errorf("%d spares; filled again: %d, %v; want some, and no more", len(spares), filled, err)
	}
	if prepared := n.Preload(n.newAlloc().Path); prepared != nil {
		prepared.Close()
		t.Error("a program was prepared where a spare waits")
	}
	a, b := n.newAlloc(), n.newAlloc()
	for _, alloc := range []*alloc{a, b} {
		alloc.add(full)
		alloc.startProxy()
		alloc.works()
	}
	left := spareIDs(t, n.Datapath)
	taken := make(map[uint32]bool)
	for path, id := range spares {
		if left[path] == 0 {
			taken[id] = true
		}
	}
	if len(taken) != 2 || !taken[a.attachedID(t)] || !taken[b.attachedID(t)] {
		t.Errorf("spares that went: %v; want those of the two ADDs, %d and %d", taken, a.attachedID(t), b.attachedID(t))
	}
	healthy(t, n.Datapath)
	if filled, err := n.FillSpares(); err != nil || filled != 2 {
		t.Errorf("filled %d, %v; want 2", filled, err)
	}
	b.remove()
	a.gone(t)
}

// Many ADDs at once, some of which find no spare: each namespace has a program of its own.
func TestManyAddsTakeSpares(t *testing.T) {
	n := newNode(t)
	fillSpares(t, n.Datapath)
	allocs := make([]*alloc, 12)
	for i := range allocs {
		allocs[i] = n.newAlloc()
	}
	var adds sync.WaitGroup
	for _, a := range allocs {
		adds.Go(func() {
			if err := n.Add(Attachment{Key: a.key, NetNS: a.Path, Request: a.request()}); err != nil {
				t.Error(err)
			}
		})
	}
	adds.Go(func() {
		if _, err := n.FillSpares(); err != nil {
			t.Error(err)
		}
	})
	adds.Wait()
	seen := make(map[uint32]bool)
	for _, a := range allocs {
		seen[a.attachedID(t)] = true
	}
	for _, id := range spareIDs(t, n.Datapath) {
		if seen[id] {
			t.Errorf("program %d is attached and a spare", id)
		}
	}
	if len(seen) != len(allocs) {
		t.Errorf("%d programs in %d namespaces", len(seen), len(allocs))
	}
	for _, a := range allocs[:3] {
		a.startProxy()
		a.works()
	}
	healthy(t, n.Datapath)
}

// A program without a cookie lets nothing in, whoever attached it.
func TestProgramWithoutCookieRefuses(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	app := a.serve(taskUID, a.taskCg, "tcp", "[::]:8080")
	prog := loadSpare(t, n.Datapath)
	ns, err := host.OpenNamespace(a.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	attached, err := link.AttachNetNs(int(ns.File.Fd()), prog)
	if err != nil {
		t.Fatal(err)
	}
	defer attached.Close()
	a.refused(a.v4, 8080)
	a.refused(a.v6, 8080)
	if err := attached.Detach(); err != nil {
		t.Fatal(err)
	}
	if answer, err := a.fromOutside(a.v4, 8080); err != nil || answer.Server != app.Name {
		t.Errorf("without the program: %+v, %v; want the application", answer, err)
	}
}

// Whatever lies where a spare should be and is not this binary's program over this node's
// tables, without a cookie: the ADD does without it, and removes it.
func TestOnlyASpareIsTaken(t *testing.T) {
	for name, instead := range map[string]func(t *testing.T, n *node) interface{ Pin(string) error }{
		"over other tables": func(t *testing.T, _ *node) interface{ Pin(string) error } {
			return loadSpare(t, newDatapath(t))
		},
		"of another namespace": func(t *testing.T, n *node) interface{ Pin(string) error } {
			other := n.newAlloc()
			other.add()
			prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(other.attachedID(t)))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { prog.Close() })
			return prog
		},
		"with other instructions": func(t *testing.T, n *node) interface{ Pin(string) error } {
			// w4 = VERDICT_REFUSED_TABLE becomes VERDICT_DIRECT.
			refused := []byte{0xb4, 4, 0, 0, byte(bpfmap.RefusedTable), 0, 0, 0}
			direct := []byte{0xb4, 4, 0, 0, byte(bpfmap.Direct), 0, 0, 0}
			edited := bytes.Replace(bpfmap.LookupObject(), refused, direct, 1)
			if bytes.Equal(edited, bpfmap.LookupObject()) {
				t.Fatal("the program has no such instruction")
			}
			defer bpfmap.SwapObjects(nil, edited)() // the others are loaded already
			return loadSpare(t, n.Datapath)
		},
		"a program that lets all in": func(t *testing.T, _ *node) interface{ Pin(string) error } {
			prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
				Name: program.LookupName, Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, License: "GPL",
				Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { prog.Close() })
			return prog
		},
		"a map": func(t *testing.T, _ *node) interface{ Pin(string) error } {
			table, err := ebpf.NewMap(&ebpf.MapSpec{Name: "own_cookie", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { table.Close() })
			return table
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			object := instead(t, n)
			pin := ""
			for path := range fillSpares(t, n.Datapath) {
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
				pin = path
			}
			if err := object.Pin(pin); err != nil {
				t.Fatal(err)
			}
			a := n.newAlloc()
			a.add(full)
			if prog, is := object.(*ebpf.Program); is && uint32(programID(t, prog)) == a.attachedID(t) {
				t.Error("ADD took it")
			}
			if _, err := os.Lstat(pin); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("its pin: %v; want it gone", err)
			}
			a.startProxy()
			a.works()
			if len(fillSpares(t, n.Datapath)) < 2 {
				t.Error("no spares afterwards")
			}
			healthy(t, n.Datapath)
		})
	}
}

// Spares of before a change of the node's programs or tables end with it.
func TestSparesEndWithWhatTheyAreFor(t *testing.T) {
	for name, change := range map[string]func(*testing.T, *node){
		"upgrade":   func(t *testing.T, n *node) { staleDigest(t, n.Datapath) },
		"migration": func(t *testing.T, n *node) { editControl(t, n.Datapath, func(row *bpfmap.BpfControl) { row.Layout++ }) },
		"lost pins": func(t *testing.T, n *node) {
			if err := os.RemoveAll(n.Paths().PinDir); err != nil {
				t.Fatal(err)
			}
		},
		"unload": func(t *testing.T, n *node) {
			if _, err := n.Unload(); err != nil {
				t.Fatal(err)
			}
			if filled, err := n.FillSpares(); err != nil || filled != 0 || len(spareIDs(t, n.Datapath)) > 0 {
				t.Errorf("filled without tables: %d, %v", filled, err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			spares := fillSpares(t, n.Datapath)
			change(t, n)
			if _, err := n.Load(); err != nil {
				t.Fatal(err)
			}
			test.Eventually(t, func() error {
				for path, id := range spares {
					if prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id)); err == nil {
						prog.Close()
						return errors.New(path + " is still in the kernel")
					}
				}
				return nil
			}, "the former spares to go")
			before := fillSpares(t, n.Datapath)
			a := n.newAlloc()
			a.add(full)
			a.startProxy()
			a.works()
			if len(before) == 0 || len(spareIDs(t, n.Datapath)) != len(before)-1 {
				t.Errorf("%d spares, then %d; want one taken", len(before), len(spareIDs(t, n.Datapath)))
			}
			healthy(t, n.Datapath)
		})
	}
}

// What another version left there is not this one's.
func TestSparesOfAnotherVersionAreReplaced(t *testing.T) {
	n := newNode(t)
	want := len(fillSpares(t, n.Datapath))
	former := filepath.Join(n.Paths().Spares(), "0123456789abcdef-0")
	if err := loadSpare(t, n.Datapath).Pin(former); err != nil {
		t.Fatal(err)
	}
	a := n.newAlloc()
	a.add()
	if _, err := os.Lstat(former); err != nil {
		t.Errorf("after an ADD: %v; a plugin leaves another version's alone", err)
	}
	if now := fillSpares(t, n.Datapath); len(now) != want || now[former] != 0 {
		t.Errorf("filled: %v; want %d and not %s", now, want, former)
	}
}
