// SPDX-License-Identifier: MPL-2.0

package program

import (
	"bytes" //nolint:gosec // the kernel's choice, not ours
	"debug/elf"
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/bpfmap/call"
	"golang.org/x/sys/unix"
)

// This file brings a program into the kernel without the library's help, which reads all
// types of an object and asks the kernel what it can: a tenth of an ADD.

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
	code   []byte
	tables []tableReference // in the order of the code
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
	o := &lookupObject{code: section("sk_lookup")}
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
	if !slices.ContainsFunc(o.tables, tableReference.isCallers) {
		return nil, fmt.Errorf("the program does not refer to %s", callersTable)
	}
	return o, nil
}

func (r tableReference) isCallers() bool { return r.name == callersTable }

func (o *lookupObject) setTable(at uint64, fd uint32) {
	binary.LittleEndian.PutUint32(o.code[at+4:], fd)
	binary.LittleEndian.PutUint32(o.code[at+insnSize+4:], 0)
}

// load loads the program over the tables of the node. No BTF is loaded.
func (o *lookupObject) load(m *bpfmap.Tables, callers int) (*ebpf.Program, error) {
	for _, reference := range o.tables {
		if reference.isCallers() {
			o.setTable(reference.at, uint32(callers))
			continue
		}
		table, err := m.Table(reference.name)
		if err != nil {
			return nil, err
		}
		o.setTable(reference.at, uint32(table.FD()))
	}
	prog, err := loadBytes(DeciderName, o.code)
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

// loadCode is loadBytes for instructions.
func loadCode(name string, code asm.Instructions) (*ebpf.Program, error) {
	var encoded bytes.Buffer
	if err := code.Marshal(&encoded, binary.LittleEndian); err != nil {
		return nil, fmt.Errorf("encode program: %w", err)
	}
	return loadBytes(name, encoded.Bytes())
}

// license is that of all our programs; some helpers are for such a one alone.
const license = "Dual MPL/GPL"

// loadBytes loads a program of sk_lookup. Where the kernel refuses it, the error ends with
// what the verifier says last.
func loadBytes(name string, code []byte) (*ebpf.Program, error) {
	zeroed := append([]byte(license), 0)
	load := progLoad{
		kind: uint32(unix.BPF_PROG_TYPE_SK_LOOKUP), expectedAttach: uint32(unix.BPF_SK_LOOKUP), count: uint32(len(code) / insnSize),
		code: unsafe.Pointer(&code[0]), license: unsafe.Pointer(&zeroed[0]),
	}
	copy(load.name[:], name)
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
