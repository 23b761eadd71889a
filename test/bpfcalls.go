// SPDX-License-Identifier: MPL-2.0

package test

import (
	"fmt"
	"os"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MapWrites counts the calls of bpf(2) that this process writes to maps with, by
// whatever library: a program at the kernel's tracepoint of system calls sees them.
type MapWrites struct {
	tb       testing.TB
	counters int // a map: calls by command
	before   [bpfCommands]uint64
	own      uint64 // lookups of this counter's own
	all      uint64 // calls that were told
	walks    uint64 // ... of them those that walk
}

// bpfCommands is more than any kernel knows.
const bpfCommands = 64

// mapWrites are the commands that change what is in a map.
var mapWrites = map[uint32]string{
	unix.BPF_MAP_UPDATE_ELEM:             "update",
	unix.BPF_MAP_DELETE_ELEM:             "delete",
	unix.BPF_MAP_LOOKUP_AND_DELETE_ELEM:  "lookup and delete",
	unix.BPF_MAP_UPDATE_BATCH:            "update of many",
	unix.BPF_MAP_DELETE_BATCH:            "delete of many",
	unix.BPF_MAP_LOOKUP_AND_DELETE_BATCH: "lookup and delete of many",
}

// CountMapWrites counts from now on, until the test ends.
func CountMapWrites(tb testing.TB) *MapWrites {
	tb.Helper()
	Need(tb, Root, BPF)
	counters, err := bpf(unix.BPF_MAP_CREATE, &struct{ kind, keySize, valueSize, entries uint32 }{unix.BPF_MAP_TYPE_ARRAY, 4, 8, bpfCommands})
	if err != nil {
		tb.Fatalf("count map writes: make map: %v", err)
	}
	tb.Cleanup(func() { unix.Close(counters) })
	program, err := countCalls(counters)
	if err != nil {
		tb.Fatalf("count map writes: %v", err)
	}
	defer unix.Close(program)
	name := []byte("sys_enter\x00")
	link, err := bpf(unix.BPF_RAW_TRACEPOINT_OPEN, &struct {
		name    unsafe.Pointer
		program uint32
	}{unsafe.Pointer(&name[0]), uint32(program)})
	if err != nil {
		tb.Fatalf("count map writes: attach to system calls: %v", err)
	}
	tb.Cleanup(func() { unix.Close(link) })
	w := &MapWrites{tb: tb, counters: counters}
	// The one key that no call is counted under.
	if err := w.element(unix.BPF_MAP_UPDATE_ELEM, bpfCommands-1, new(uint64)); err != nil {
		tb.Fatalf("count map writes: write map: %v", err)
	}
	if seen := w.Seen(); seen["update"] != 1 || len(seen) != 1 {
		tb.Fatalf("count map writes: one write was made, and seen were %v", seen)
	}
	return w
}

// Seen is how many writes there were since it was last asked, by their kind.
func (w *MapWrites) Seen() map[string]uint64 {
	w.tb.Helper()
	seen := make(map[string]uint64)
	for command, kind := range mapWrites {
		var calls uint64
		if err := w.element(unix.BPF_MAP_LOOKUP_ELEM, command, &calls); err != nil {
			w.tb.Fatalf("count map writes: read map: %v", err)
		}
		if calls > w.before[command] {
			seen[kind] = calls - w.before[command]
		}
		w.before[command] = calls
	}
	return seen
}

// Calls is how many calls of bpf(2) of whatever kind there were since it was last asked.
func (w *MapWrites) Calls() uint64 {
	w.tb.Helper()
	var all uint64
	for command := range uint32(bpfCommands - 1) {
		var calls uint64
		if err := w.element(unix.BPF_MAP_LOOKUP_ELEM, command, &calls); err != nil {
			w.tb.Fatalf("count calls of bpf: read map: %v", err)
		}
		if command == unix.BPF_MAP_LOOKUP_ELEM {
			calls -= w.own
		}
		all += calls
	}
	since := all - w.all
	w.all = all
	return since
}

// Walks is how many calls asked for the next rows of a whole map since it was last asked.
func (w *MapWrites) Walks() uint64 {
	w.tb.Helper()
	var all uint64
	for _, command := range []uint32{unix.BPF_MAP_GET_NEXT_KEY, unix.BPF_MAP_LOOKUP_BATCH} {
		var calls uint64
		if err := w.element(unix.BPF_MAP_LOOKUP_ELEM, command, &calls); err != nil {
			w.tb.Fatalf("count walks through maps: read map: %v", err)
		}
		all += calls
	}
	since := all - w.walks
	w.walks = all
	return since
}

func (w *MapWrites) element(command int, key uint32, value *uint64) error {
	if command == unix.BPF_MAP_LOOKUP_ELEM {
		w.own++
	}
	_, err := bpf(command, &struct {
		table      uint32
		key, value unsafe.Pointer
		flags      uint64
	}{uint32(w.counters), unsafe.Pointer(&key), unsafe.Pointer(value), 0})
	return err
}

// instruction is one of eBPF's.
type instruction struct {
	code      uint8
	registers uint8 // destination, and source << 4
	offset    int16
	immediate int32
}

// countCalls loads the program that counts this process's calls of bpf(2).
func countCalls(counters int) (program int, err error) {
	offsets := map[string]int32{"amd64": 112, "arm64": 0} // of the first argument in struct pt_regs
	argument, known := offsets[runtime.GOARCH]
	if !known {
		return 0, fmt.Errorf("load program: where %s has a system call's arguments is not known here", runtime.GOARCH)
	}
	var namespace unix.Stat_t // in which the process has its ID
	if err := unix.Stat("/proc/self/ns/pid", &namespace); err != nil {
		return 0, fmt.Errorf("look at /proc/self/ns/pid: %w", err)
	}
	const (
		r0, r1, r2, r3, r4, r6, r10    = 0, 1, 2, 3, 4, 6, 10
		load8, load4, store4, add8     = 0x79, 0x61, 0x63, 0xdb
		move, set, add, wide           = 0xbf, 0xb7, 0x07, 0x18
		unequal, equal, atLeast, leave = 0x55, 0x15, 0x35, 0x95
		call                           = 0x85
		lookup, readKernel, pidAndTgid = 1, 113, 120
		end                            = -1 // jumps to the end
	)
	from := func(to, source uint8) uint8 { return to | source<<4 }
	code := []instruction{
		{move, from(r6, r1), 0, 0},
		{load8, from(r1, r6), 8, 0}, // the system call's number
		{unequal, r1, end, unix.SYS_BPF},
		{wide, r1, 0, int32(uint32(namespace.Dev))}, {immediate: int32(namespace.Dev >> 32)},
		{wide, r2, 0, int32(uint32(namespace.Ino))}, {immediate: int32(namespace.Ino >> 32)},
		{move, from(r3, r10), 0, 0},
		{add, r3, 0, -8},
		{set, r4, 0, 8},
		{call, 0, 0, pidAndTgid},
		{unequal, r0, end, 0},
		{load4, from(r1, r10), -4, 0},
		{unequal, r1, end, int32(os.Getpid())},
		{load8, from(r3, r6), 0, 0}, // the registers
		{add, r3, 0, argument},
		{move, from(r1, r10), 0, 0},
		{add, r1, 0, -16},
		{set, r2, 0, 8},
		{call, 0, 0, readKernel},
		{unequal, r0, end, 0},
		{load4, from(r1, r10), -16, 0},
		{atLeast, r1, end, bpfCommands},
		{store4, from(r10, r1), -20, 0},
		{wide, from(r1, unix.BPF_PSEUDO_MAP_FD), 0, int32(counters)}, {},
		{move, from(r2, r10), 0, 0},
		{add, r2, 0, -20},
		{call, 0, 0, lookup},
		{equal, r0, end, 0},
		{set, r1, 0, 1},
		{add8, from(r0, r1), 0, 0},
		{set, r0, 0, 0},
		{leave, 0, 0, 0},
	}
	for i := range code {
		if code[i].offset == end {
			code[i].offset = int16(len(code) - 2 - i - 1)
		}
	}
	license, log := []byte("Dual MPL/GPL\x00"), make([]byte, 64<<10)
	program, err = bpf(unix.BPF_PROG_LOAD, &struct {
		kind, count        uint32
		code, license      unsafe.Pointer
		logLevel, logSize  uint32
		log                unsafe.Pointer
		kernel, flags      uint32
		name               [16]byte
		device, attachType uint32
	}{
		kind: unix.BPF_PROG_TYPE_RAW_TRACEPOINT, count: uint32(len(code)), code: unsafe.Pointer(&code[0]), license: unsafe.Pointer(&license[0]),
		logLevel: 1, logSize: uint32(len(log)), log: unsafe.Pointer(&log[0]),
	})
	if err != nil {
		return 0, fmt.Errorf("load program: %w: %s", err, unix.ByteSliceToString(log))
	}
	return program, nil
}

func bpf[Attributes any](command int, attributes *Attributes) (int, error) {
	for {
		fd, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(command), uintptr(unsafe.Pointer(attributes)), unsafe.Sizeof(*attributes))
		switch {
		case errno == 0:
			return int(fd), nil
		case errno != unix.EAGAIN || command != unix.BPF_PROG_LOAD: // a signal, as the runtime sends itself, ends the verifier
			return -1, errno
		}
	}
}
