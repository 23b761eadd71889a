// SPDX-License-Identifier: MPL-2.0

package program

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/program/cell"
	"github.com/weirmesh/weir/redirect/store"
	"golang.org/x/sys/unix"
)

// This file asks the kernel what is attached. Pins tell less: another bpffs may
// be mounted over them, or somebody removed them, and the programs still run.

// hook is a place at the root of cgroup v2, with the program that belongs there.
type hook struct {
	Program string
	Attach  ebpf.AttachType
}

func Hooks() []hook {
	return []hook{
		{"weir_bind4", ebpf.AttachCGroupInet4PostBind},
		{"weir_bind6", ebpf.AttachCGroupInet6PostBind},
		{"weir_connect4", ebpf.AttachCGroupInet4Connect},
		{"weir_connect6", ebpf.AttachCGroupInet6Connect},
		{"weir_getsockopt", ebpf.AttachCGroupGetsockopt},
		{"weir_peername4", ebpf.AttachCgroupInet4GetPeername},
		{"weir_peername6", ebpf.AttachCgroupInet6GetPeername},
		{"weir_recvmsg4", ebpf.AttachCGroupUDP4Recvmsg},
		{"weir_recvmsg6", ebpf.AttachCGroupUDP6Recvmsg},
		{"weir_sendmsg4", ebpf.AttachCGroupUDP4Sendmsg},
		{"weir_sendmsg6", ebpf.AttachCGroupUDP6Sendmsg},
		{"weir_setsockopt", ebpf.AttachCGroupSetsockopt},
		{"weir_socket", ebpf.AttachCGroupInetSockCreate},
		{"weir_sockname6", ebpf.AttachCgroupInet6GetSockname},
		{"weir_sockops", ebpf.AttachCGroupSockOps},
	}
}

// ProgramNames are the programs that are attached at the root of cgroup v2.
func ProgramNames() (names []string) {
	for _, h := range Hooks() {
		names = append(names, h.Program)
	}
	return names
}

const LookupName = "weir_lookup"

// InstanceOf tells the programs of this instance from those of others on the same
// cgroup root, also where their pins cannot be seen. Two nodes in mount namespaces of
// their own may have the same pin directory by name, so the file system of the state
// counts, too: it is there before any pin, and stays while the pins are hidden.
func InstanceOf(p store.Paths) uint32 {
	return instance(filepath.Clean(p.PinDir), fmt.Sprint(deviceOf(p.StateDir)))
}

// FormerInstanceOf is what versions took that looked at the pin directory alone.
func FormerInstanceOf(p store.Paths) uint32 { return instance(filepath.Clean(p.PinDir)) }

func instance(parts ...string) uint32 {
	sum := fnv.New32a()
	_, _ = sum.Write([]byte(strings.Join(parts, "\x00")))
	return max(1, sum.Sum32()) // 0: older than instances
}

// deviceOf is the device of the file system that a directory is in, or will be.
func deviceOf(dir string) uint64 {
	var stat unix.Stat_t
	for unix.Stat(dir, &stat) != nil && dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir)
	}
	return stat.Dev
}

// AttachedProgram is a program that runs at a hook, whoever attached it.
type AttachedProgram struct {
	ID   ebpf.ProgramID
	Name string
	UID  uint32 // who loaded it
	Maps []ebpf.MapID

	kind uint32
	tag  [8]byte // the kernel's sum of its instructions
}

// AttachedTo returns what is attached to a cgroup or a namespace itself, in the
// order in which it runs. One that ends meanwhile is left out.
func AttachedTo(target *os.File, attach ebpf.AttachType) (list []AttachedProgram, err error) {
	var result *link.QueryResult
	for range 8 {
		result, err = link.QueryPrograms(link.QueryOptions{Target: int(target.Fd()), Attach: attach})
		if !errors.Is(err, syscall.ENOSPC) { // another one came between its two questions
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("list programs at %s: %w", attach, err)
	}
	for _, found := range result.Programs {
		prog, err := DescribeProgram(found.ID)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		list = append(list, prog)
	}
	return list, nil
}

// Set is what one instance of Weir, of any version, has attached: its
// programs, with the tables that they share.
type Set struct {
	Instance uint32 // 0: of a version that did not say
	layout   uint32 // of its tables; 0: not known
	ending   bool   // some of its tables are gone already
	Tables   map[string]ebpf.MapID
	Programs map[string][]ebpf.ProgramID // at the root, by name
}

func (s *Set) Reads(id ebpf.MapID) bool {
	for _, table := range s.Tables {
		if table == id {
			return true
		}
	}
	return false
}

// seenTables are tables that were described already: the programs of a set share them.
type seenTables map[ebpf.MapID]seenTable

type seenTable struct {
	name             string
	layout, instance uint32 // of the node's row, where it is the table that has it
}

// describe is what a table is; an error that is fs.ErrNotExist where it is gone.
func (seen seenTables) describe(id ebpf.MapID) (found seenTable, err error) {
	if found, known := seen[id]; known {
		return found, nil
	}
	if found.name, err = mapName(id); err != nil {
		return found, err
	}
	if found.name == "control" {
		control, err := ebpf.NewMapFromID(id)
		if err != nil {
			return found, fmt.Errorf("open map %d: %w", id, err)
		}
		found.layout, found.instance = signatureOf(control)
		control.Close()
	}
	seen[id] = found
	return found, nil
}

// setOf reads the tables of a program of Weir.
func setOf(prog AttachedProgram, seen seenTables) (*Set, error) {
	s := &Set{Tables: make(map[string]ebpf.MapID), Programs: make(map[string][]ebpf.ProgramID)}
	for _, id := range prog.Maps {
		table, err := seen.describe(id)
		if errors.Is(err, fs.ErrNotExist) {
			s.ending = true
			continue
		}
		if err != nil {
			return nil, err
		}
		s.Tables[table.name] = id
		if table.name == "control" {
			s.layout, s.Instance = table.layout, table.instance
		}
	}
	return s, nil
}

// signatureOf reads the node's row of whatever layout; see struct control.
func signatureOf(control *ebpf.Map) (layout, instance uint32) {
	row, err := control.LookupBytes(uint32(0))
	if err != nil || len(row) < 16 {
		return 0, 0
	}
	return binary.NativeEndian.Uint32(row[8:]), binary.NativeEndian.Uint32(row[12:])
}

// Ends reports whether some of the set is gone already, which the rest is about to
// follow: that of an instance whose last pins were just removed.
func (s *Set) Ends() bool {
	return s.ending || s.Tables["control"] == 0 || s.layout == bpfmap.Layout && slices.ContainsFunc(bpfmap.MapNames(), func(name string) bool {
		return s.Tables[name] == 0
	})
}

// SetsAt returns the instances of Weir at a cgroup root.
func SetsAt(root *os.File) (sets []*Set, err error) {
	seen := make(seenTables)
	for _, h := range Hooks() {
		list, err := AttachedTo(root, h.Attach)
		if err != nil {
			return nil, err
		}
		for _, prog := range list {
			if prog.Name != h.Program {
				continue
			}
			if sets, err = joinSets(sets, prog, seen); err != nil {
				return nil, err
			}
		}
	}
	return sets, nil
}

// joinSets adds a program to the set that it shares a table with.
func joinSets(sets []*Set, prog AttachedProgram, seen seenTables) ([]*Set, error) {
	one, err := setOf(prog, seen)
	if err != nil {
		return nil, err
	}
	one.Programs[prog.Name] = []ebpf.ProgramID{prog.ID}
	apart := sets[:0:0]
	for _, s := range sets {
		if !slices.ContainsFunc(prog.Maps, s.Reads) {
			apart = append(apart, s)
			continue
		}
		one.Instance, one.layout, one.ending = max(one.Instance, s.Instance), max(one.layout, s.layout), one.ending || s.ending
		for name, id := range s.Tables {
			one.Tables[name] = id
		}
		for name, ids := range s.Programs {
			one.Programs[name] = append(ids, one.Programs[name]...)
		}
	}
	return append(apart, one), nil
}

// Serves counts the namespaces among cookies that a set has rows for.
func (s *Set) Serves(cookies []uint64) (count int) {
	table, err := ebpf.NewMapFromID(s.Tables["workloads"])
	if err != nil {
		return 0
	}
	defer table.Close()
	for _, cookie := range cookies {
		if row, err := table.LookupBytes(cookie); err == nil && row != nil {
			count++
		}
	}
	return count
}

// EachLink visits every link in the kernel, pinned or not.
func EachLink(visit func(link.Link, *link.Info) error) error {
	links := new(link.Iterator)
	defer links.Close()
	for links.Next() {
		info, err := links.Link.Info()
		if err != nil {
			continue // of a kind that nobody can ask
		}
		if err := visit(links.Link, info); err != nil {
			return err
		}
	}
	if err := links.Err(); err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	return nil
}

// PinnedID is the ID of a pinned map; 0 where there is none.
func PinnedID(path string) (ebpf.MapID, error) {
	table, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("open map %s: %w", path, err)
	}
	defer table.Close()
	return MapID(table)
}

func MapID(table *ebpf.Map) (ebpf.MapID, error) {
	info, err := table.Info()
	if err != nil {
		return 0, fmt.Errorf("read map: %w", err)
	}
	id, _ := info.ID()
	return id, nil
}

// Whole reports whether each program of the set is where it belongs. A set of
// another version may have fewer of them, so those are asked for that redirect.
func (s *Set) Whole() bool {
	names := []string{"weir_connect4", "weir_connect6", "weir_getsockopt"}
	if s.digest() == bpfmap.Digest() {
		names = ProgramNames()
	}
	for _, name := range names {
		if len(s.Programs[name]) != 1 {
			return false
		}
	}
	return true
}

// digest is that of the objects that the set's programs are from.
func (s *Set) digest() [2]uint64 {
	var row bpfmap.BpfControl
	table, err := ebpf.NewMapFromID(s.Tables["control"])
	if err != nil {
		return row.Digest
	}
	defer table.Close()
	if err := table.Lookup(uint32(0), &row); err != nil || row.Layout != bpfmap.Layout {
		return [2]uint64{}
	}
	return row.Digest
}

// CookieOf is the cookie of the namespace that a lookup program of the set is for;
// 0 where the program is not of the set. known is what the records say of it.
// Without a record the program says so itself: it has the cookie in its cell or, from
// a version before, among its constants.
func (s *Set) CookieOf(id ebpf.ProgramID, known uint64) (uint64, error) {
	found, err := DescribeProgram(id)
	if errors.Is(err, fs.ErrNotExist) || err == nil && (found.Name != LookupName || !slices.ContainsFunc(found.Maps, s.Reads)) {
		return 0, nil
	}
	if err != nil || known != 0 {
		return known, err
	}
	for _, table := range found.Maps {
		cellFD, err := cell.Open(uint32(table))
		if err != nil {
			continue
		}
		defer unix.Close(cellFD)
		cookie, err := cell.Read(cellFD)
		if err != nil || s.Serves([]uint64{cookie}) == 0 {
			return 0, err
		}
		return cookie, nil
	}
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return 0, nil // it ended
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return 0, fmt.Errorf("read program %d: %w", id, err)
	}
	code, err := info.Instructions()
	if err != nil {
		return 0, nil // this kernel does not show it: its workload's CHECK finds it
	}
	for _, insn := range code {
		if insn.OpCode.IsDWordLoad() && insn.Src == asm.R0 && s.Serves([]uint64{uint64(insn.Constant)}) == 1 {
			return uint64(insn.Constant), nil
		}
	}
	return 0, nil
}
