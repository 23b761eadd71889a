// SPDX-License-Identifier: MPL-2.0

package program

import (
	"bytes"
	"crypto/sha1" //nolint:gosec // the kernel's choice, not ours
	"crypto/sha256"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/bpfmap/call"
	"github.com/weirmesh/weir/redirect/program/cell"
	"golang.org/x/sys/unix"
)

// This file brings one small program from the object into the kernel, for each
// namespace anew. The library's way there, which the programs of the node take,
// reads all types of the object and asks the kernel what it can: a tenth of an ADD.

const (
	insnSize    = 8
	insnLoad64  = 0x18 // BPF_LD | BPF_IMM | BPF_DW, two instructions long
	insnSymSize = 16   // struct elf64_rel
	pseudoMapFD = 1 << 4
	relocLoad64 = 1 // R_BPF_64_64
)

// lookupObject is the program of the object bpf/lookup.c, whose references to
// tables are empty.
type lookupObject struct {
	code    []byte
	license string
	tables  []tableReference // in the order of the code
}

type tableReference struct {
	name string
	at   uint64 // in the code
}

func readLookup() (*lookupObject, error) {
	object, err := elf.NewFile(bytes.NewReader(bpfmap.LookupObject()))
	if err != nil {
		return nil, err
	}
	section := func(name string) []byte {
		data := []byte(nil)
		if found := object.Section(name); found != nil && err == nil {
			data, err = found.Data()
		}
		return data
	}
	o := &lookupObject{code: section("sk_lookup"), license: string(bytes.TrimRight(section("license"), "\x00"))}
	relocations := section(".relsk_lookup")
	if err != nil {
		return nil, err
	}
	symbols, err := object.Symbols() // without the first one, which is empty
	if err != nil {
		return nil, err
	}
	for ; len(relocations) >= insnSymSize; relocations = relocations[insnSymSize:] {
		at, what := binary.LittleEndian.Uint64(relocations), binary.LittleEndian.Uint64(relocations[8:])
		symbol := int(what>>32) - 1
		if uint32(what) != relocLoad64 || symbol < 0 || symbol >= len(symbols) || at+2*insnSize > uint64(len(o.code)) || o.code[at] != insnLoad64 {
			return nil, fmt.Errorf("relocation at %#x is not that of a table", at)
		}
		o.code[at+1] = o.code[at+1]&0xf | pseudoMapFD
		o.setTable(at, 0)
		o.tables = append(o.tables, tableReference{symbols[symbol].Name, at})
	}
	if !slices.ContainsFunc(o.tables, tableReference.isCell) {
		return nil, fmt.Errorf("the program does not refer to %s", cell.Name)
	}
	return o, nil
}

func (r tableReference) isCell() bool { return r.name == cell.Name }

func (o *lookupObject) setTable(at uint64, fd uint32) {
	binary.LittleEndian.PutUint32(o.code[at+4:], fd)
	binary.LittleEndian.PutUint32(o.code[at+insnSize+4:], 0)
}

// hasTag reports whether this is the kernel's sum of the program: SHA-1 of the
// instructions without the tables, from Linux 6.18 on SHA-256.
func (o *lookupObject) hasTag(tag [8]byte) bool {
	former, sum := sha1.Sum(o.code), sha256.Sum256(o.code)
	return bytes.Equal(tag[:], sum[:8]) || bytes.Equal(tag[:], former[:8])
}

// loadLookup loads the program over the tables of the node, with a cell of its own, in
// which no cookie is yet.
func loadLookup(m *bpfmap.Tables) (prog *ebpf.Program, cellFD int, err error) {
	o, err := readLookup()
	if err != nil {
		return nil, -1, fmt.Errorf("read lookup program: %w", err)
	}
	if cellFD, err = cell.Create(); err != nil {
		return nil, -1, err
	}
	if prog, err = o.load(m, cellFD); err != nil {
		return nil, -1, errors.Join(err, unix.Close(cellFD))
	}
	return prog, cellFD, nil
}

func (o *lookupObject) load(m *bpfmap.Tables, cellFD int) (*ebpf.Program, error) {
	for _, reference := range o.tables {
		if reference.isCell() {
			o.setTable(reference.at, uint32(cellFD))
			continue
		}
		table, err := m.Table(reference.name)
		if err != nil {
			return nil, err
		}
		o.setTable(reference.at, uint32(table.FD()))
	}
	prog, err := loadCode(o.code, o.license)
	if err != nil {
		return nil, fmt.Errorf("load lookup program: %w", err)
	}
	return prog, nil
}

// progLoad is what bpf(2) takes for BPF_PROG_LOAD, as far as it is needed here.
type progLoad struct {
	kind, count    uint32
	code, license  unsafe.Pointer
	logLevel       uint32
	logSize        uint32
	log            unsafe.Pointer
	_, _           uint32 // the kernel's version, flags
	name           [16]byte
	_              uint32 // a device
	expectedAttach uint32
}

// loadCode loads the program. Where the kernel refuses it, the error ends with
// what the verifier says last.
func loadCode(code []byte, license string) (*ebpf.Program, error) {
	zeroed := append([]byte(license), 0)
	load := progLoad{
		kind: uint32(unix.BPF_PROG_TYPE_SK_LOOKUP), expectedAttach: uint32(unix.BPF_SK_LOOKUP), count: uint32(len(code) / insnSize),
		code: unsafe.Pointer(&code[0]), license: unsafe.Pointer(&zeroed[0]),
	}
	copy(load.name[:], "weir_lookup")
	fd, err := load.do()
	if err == nil {
		return ebpf.NewProgramFromFD(fd)
	}
	log := make([]byte, 1<<20)
	load.logLevel, load.logSize, load.log = 1, uint32(len(log)), unsafe.Pointer(&log[0])
	if fd, again := load.do(); again == nil {
		return ebpf.NewProgramFromFD(fd)
	}
	text, _, _ := strings.Cut(string(log), "\x00")
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return nil, fmt.Errorf("%w: %s", err, strings.Join(lines[max(0, len(lines)-3):], "; "))
}

func (load *progLoad) do() (fd int, err error) {
	var pinner runtime.Pinner // the kernel follows the pointers
	defer pinner.Unpin()
	for _, pointer := range []unsafe.Pointer{load.code, load.license, load.log} {
		if pointer != nil {
			pinner.Pin((*byte)(pointer))
		}
	}
	return call.BPF(unix.BPF_PROG_LOAD, load)
}

// OpenProgram opens a pinned program to read.
func OpenProgram(path string) (*ebpf.Program, error) {
	fd, err := call.OpenPin(path, unix.BPF_F_RDONLY)
	if err != nil {
		return nil, err
	}
	return ebpf.NewProgramFromFD(fd)
}

// NewCollection loads the programs over the tables.
func NewCollection(spec *ebpf.CollectionSpec, pins map[string]*ebpf.Map) (*ebpf.Collection, error) {
	if origins := pins["origins"]; origins != nil {
		bpfmap.SetHighWater(spec, origins.MaxEntries())
	}
	collection, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: pins})
	if err != nil {
		return nil, fmt.Errorf("load programs: %w", err)
	}
	return collection, nil
}
