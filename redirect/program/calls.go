// SPDX-License-Identifier: MPL-2.0

package program

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/bpfmap/call"
	"github.com/weirmesh/weir/redirect/host/sysctl"
	"github.com/weirmesh/weir/redirect/store"
	"golang.org/x/sys/unix"
)

// The sk_lookup program that decides is loaded once for the node. sk_lookup cannot ask for
// the namespace's cookie, so each namespace has a program of nineteen instructions that
// knows it, notes it and makes a tail call.

// What the namespaces' programs share, pinned under these names.
const (
	callsTable   = "lookup_calls"   // a table of programs: the node's lookup program is the only one
	callersTable = "lookup_callers" // of bpf/lookup.c: who calls it on a processor now
)

// DeciderName is the name of the program that is called.
const DeciderName = "weir_decide"

// CallNames are the names of their pins.
func CallNames() []string { return []string{callersTable, callsTable} }

// calls are their open descriptors. The kernel empties a table of programs with its last pin
// and descriptor, whoever calls by it.
type calls struct{ callers, programs int }

// openCalls returns fs.ErrNotExist where one is not pinned.
func openCalls(dir string) (c calls, err error) {
	if c.callers, err = call.OpenPin(filepath.Join(dir, callersTable), 0); err != nil {
		return c, err
	}
	if c.programs, err = call.OpenPin(filepath.Join(dir, callsTable), 0); err != nil {
		return c, errors.Join(err, unix.Close(c.callers))
	}
	return c, nil
}

func (c calls) close() error { return errors.Join(unix.Close(c.callers), unix.Close(c.programs)) }

// MakeCalls loads the node's lookup program and pins in dir what leads to it. No namespace
// calls by what is pinned there. The caller holds the lock.
func MakeCalls(m *bpfmap.Tables, dir string) error {
	return makeCalls(m, dir, func(calls) error { return nil })
}

// RemakeCalls is MakeCalls where programs of namespaces call by what was pinned: each is
// given a new one. The pins come last, so that a process that dies before leaves a node that
// lacks them, see LostCalls.
func RemakeCalls(m *bpfmap.Tables, paths store.Paths) (cookies []uint64, err error) {
	err = makeCalls(m, paths.Calls(), func(c calls) error {
		if cookies, err = callersOf(paths); err != nil {
			return err
		}
		for _, cookie := range cookies {
			if err := c.swap(m, paths.Lookup(cookie), cookie); err != nil {
				return fmt.Errorf("swap lookup program of namespace %d: %w", cookie, err)
			}
		}
		return nil
	})
	return cookies, err
}

// RenewCalls puts this binary's lookup program in the place of the one that is called, for
// all namespaces at once. The caller holds the lock.
func RenewCalls(m *bpfmap.Tables, paths store.Paths) error {
	c, err := openCalls(paths.Calls())
	if err == nil {
		err = errors.Join(c.setDecider(m), c.close())
	}
	if errors.Is(err, fs.ErrNotExist) {
		_, err = RemakeCalls(m, paths)
	}
	return err
}

// makeCalls has before called with what leads to the lookup program, and pins it then.
func makeCalls(m *bpfmap.Tables, dir string, before func(calls) error) error {
	callers, err := ebpf.NewMap(&ebpf.MapSpec{Name: callersTable, Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 16, MaxEntries: 1})
	if err != nil {
		return fmt.Errorf("create map %s: %w", callersTable, err)
	}
	defer callers.Close()
	programs, err := ebpf.NewMap(&ebpf.MapSpec{Name: callsTable, Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		return fmt.Errorf("create map %s: %w", callsTable, err)
	}
	defer programs.Close()
	c := calls{callers: callers.FD(), programs: programs.FD()}
	if err := c.setDecider(m); err != nil {
		return err
	}
	// Who calls by what is pinned now is closed from its removal on: not before it is known
	// that the kernel takes the others.
	trial, err := c.load(m, 0)
	if err != nil {
		return err
	}
	if err := errors.Join(trial.Close(), RemoveTree(dir)); err != nil {
		return err
	}
	if err := before(c); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("create pin directory: %w", err)
	}
	if err := errors.Join(callers.Pin(filepath.Join(dir, callersTable)), programs.Pin(filepath.Join(dir, callsTable))); err != nil {
		return fmt.Errorf("pin what leads to the lookup program: %w", err)
	}
	return nil
}

// errInterpreted: the kernel would not compile a program that is loaded now. It refuses an
// interpreted program that calls a compiled one, and crashed (6.12, 7.2) where both were
// interpreted.
var errInterpreted = errors.New("the kernel does not compile programs: set net.core.bpf_jit_enable to 1")

// interpreted returns errInterpreted where that is so. A kernel without the key compiles all.
func interpreted() error {
	if value, err := sysctl.Shared().Read("net", "core", "bpf_jit_enable"); err == nil && value == "0" {
		return errInterpreted
	}
	return nil
}

// setDecider loads the lookup program and has it called.
func (c calls) setDecider(m *bpfmap.Tables) error {
	if err := interpreted(); err != nil {
		return fmt.Errorf("load lookup program: %w", err)
	}
	o, err := readLookup()
	if err != nil {
		return fmt.Errorf("read lookup program: %w", err)
	}
	prog, err := o.load(m, c.callers)
	if err != nil {
		return err
	}
	defer prog.Close()
	if err := call.SetCell(c.programs, 0, uint32(prog.FD())); err != nil {
		return fmt.Errorf("write map %s: %w", callsTable, err)
	}
	return nil
}

// SwapLookup replaces the program of a pinned link by one that calls by what is pinned in
// dir.
func SwapLookup(m *bpfmap.Tables, dir, pin string, cookie uint64) error {
	c, err := openCalls(dir)
	if err != nil {
		return err
	}
	return errors.Join(c.swap(m, pin, cookie), c.close())
}

func (c calls) swap(m *bpfmap.Tables, pin string, cookie uint64) error {
	pinned, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return err
	}
	defer pinned.Close()
	prog, err := c.load(m, cookie)
	if err != nil {
		return err
	}
	defer prog.Close()
	// ENOLINK: its namespace is gone, or somebody detached it; see ensure.
	if err := pinned.Update(prog); err != nil && !errors.Is(err, unix.ENOLINK) {
		return err
	}
	return nil
}

// newLookup loads the sk_lookup program of one namespace. What it calls by is made anew
// where it is not there, as on a node that an older version loaded, or where that version
// made other tables.
func newLookup(m *bpfmap.Tables, paths store.Paths, cookie uint64) (prog *ebpf.Program, err error) {
	err = m.Alone(func() error { // workloads are completed on all processors
		if prog, err = loadLookup(m, paths, cookie); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if _, err = RemakeCalls(m, paths); err == nil {
			prog, err = loadLookup(m, paths, cookie)
		}
		return err
	})
	return prog, err
}

func loadLookup(m *bpfmap.Tables, paths store.Paths, cookie uint64) (*ebpf.Program, error) {
	c, err := openCalls(paths.Calls())
	if err != nil {
		return nil, err
	}
	if !c.decideBy(m) {
		return nil, errors.Join(c.close(), fs.ErrNotExist)
	}
	prog, err := c.load(m, cookie)
	return prog, errors.Join(err, c.close())
}

// decideBy reports whether the program that is called reads these tables.
func (c calls) decideBy(m *bpfmap.Tables) bool {
	id, err := call.Cell[uint32](c.programs, 0)
	if err != nil {
		return false
	}
	prog, err := DescribeProgram(ebpf.ProgramID(id))
	if err != nil {
		return false
	}
	workloads, err := m.ID("workloads")
	return err == nil && slices.Contains(prog.Maps, workloads)
}

// load loads a program that notes its run and the cookie, and makes the call. It refuses
// where nothing is called. Two tables it refers to only for who asks whose program it is.
func (c calls) load(m *bpfmap.Tables, cookie uint64) (*ebpf.Program, error) {
	workloads, err := m.Table("workloads")
	if err != nil {
		return nil, err
	}
	control, err := m.Table("control")
	if err != nil {
		return nil, err
	}
	const key, refuse = -4, "refuse"
	prog, err := loadCode(LookupName, asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1), // the context
		asm.LoadMapPtr(asm.R1, workloads.FD()),
		asm.LoadMapPtr(asm.R1, control.FD()),
		asm.StoreImm(asm.RFP, key, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, c.callers),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, key),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, refuse),
		asm.StoreMem(asm.R0, 0, asm.R6, asm.DWord),
		asm.LoadImm(asm.R1, int64(cookie), asm.DWord),
		asm.StoreMem(asm.R0, 8, asm.R1, asm.DWord),
		// The entry, 0: a cookie has no highest bit. By a constant the kernel would patch
		// each caller and keep them all in one list, through which every ADD and DEL goes.
		asm.LoadMem(asm.R3, asm.R0, 8, asm.DWord),
		asm.RSh.Imm(asm.R3, 63),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.LoadMapPtr(asm.R2, c.programs),
		asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol(refuse), // SK_DROP
		asm.Return(),
	})
	if errors.Is(err, unix.EINVAL) {
		err = cmp.Or(interpreted(), err)
	}
	if err != nil {
		return nil, fmt.Errorf("load lookup program: %w", err)
	}
	return prog, nil
}

// PinCalls pins again what the namespaces call by, where another bpffs hides its pins.
func PinCalls(paths store.Paths) (repairs []Repair, err error) {
	cookies, err := callersOf(paths)
	if err != nil || len(cookies) == 0 {
		return nil, err
	}
	prog, err := DescribePinned(paths.Lookup(cookies[0]))
	if err != nil {
		return nil, nil // it went meanwhile
	}
	for _, id := range prog.Maps {
		name, err := mapName(id)
		if err != nil || !slices.Contains(CallNames(), name) {
			continue
		}
		table, err := ebpf.NewMapFromID(id)
		if err != nil {
			continue
		}
		pinned, err := PinAgain(filepath.Join(paths.Calls(), name), table)
		table.Close()
		if err != nil {
			return repairs, err
		}
		if pinned {
			repairs = append(repairs, Repair{Kind: PinPutBack, Object: "map " + name})
		}
	}
	return repairs, nil
}

// LostCalls are the cookies of the namespaces that call by what is not pinned any more, or
// where nothing is called, so that all of theirs is refused. On a node of an older version
// nobody calls.
func LostCalls(paths store.Paths) (cookies []uint64, err error) {
	c, err := openCalls(paths.Calls())
	if err == nil {
		_, called := call.Cell[uint32](c.programs, 0)
		err = errors.Join(called, c.close())
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return callersOf(paths)
}

// callersOf are the cookies of the namespaces whose program makes the call.
func callersOf(paths store.Paths) (cookies []uint64, err error) {
	all, err := LookupCookies(paths)
	if err != nil {
		return nil, err
	}
	for _, cookie := range all {
		prog, err := DescribePinned(paths.Lookup(cookie)) // it may go meanwhile
		if err == nil && callsDecider(prog) {
			cookies = append(cookies, cookie)
		}
	}
	return cookies, nil
}

// DescribePinned describes the program of a pinned link; fs.ErrNotExist where one of them is
// gone.
func DescribePinned(pin string) (prog AttachedProgram, err error) {
	pinned, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return prog, err
	}
	defer pinned.Close()
	info, err := pinned.Info()
	if err != nil {
		return prog, err
	}
	return DescribeProgram(info.Program)
}

// LookupCookies are those of the namespaces that have a program pinned.
func LookupCookies(paths store.Paths) (cookies []uint64, err error) {
	entries, err := os.ReadDir(paths.Lookups())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list lookup programs: %w", err)
	}
	for _, entry := range entries {
		if cookie, err := strconv.ParseUint(entry.Name(), 10, 64); err == nil {
			cookies = append(cookies, cookie)
		}
	}
	return cookies, nil
}

// callsDecider reports whether the program of a namespace calls the node's, and is not one
// of an older version that decides itself.
func callsDecider(prog AttachedProgram) bool {
	return slices.ContainsFunc(prog.Maps, func(id ebpf.MapID) bool {
		name, err := mapName(id)
		return err == nil && name == callsTable
	})
}
