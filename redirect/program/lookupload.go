// SPDX-License-Identifier: MPL-2.0

package program

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
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

// lookupCode is the program of the object bpf/lookup.c with the tables of the
// node and the cookie in the places where it has their names and a marker.
func lookupCode(m *bpfmap.Tables, cookie uint64) (code []byte, license string, err error) {
	object, err := elf.NewFile(bytes.NewReader(bpfmap.LookupObject()))
	if err != nil {
		return nil, "", err
	}
	section := func(name string) []byte {
		data := []byte(nil)
		if found := object.Section(name); found != nil && err == nil {
			data, err = found.Data()
		}
		return data
	}
	code, relocations, license := section("sk_lookup"), section(".relsk_lookup"), string(bytes.TrimRight(section("license"), "\x00"))
	if err != nil {
		return nil, "", err
	}
	symbols, err := object.Symbols() // without the first one, which is empty
	if err != nil {
		return nil, "", err
	}
	for ; len(relocations) >= insnSymSize; relocations = relocations[insnSymSize:] {
		at, what := binary.LittleEndian.Uint64(relocations), binary.LittleEndian.Uint64(relocations[8:])
		symbol := int(what>>32) - 1
		if uint32(what) != relocLoad64 || symbol < 0 || symbol >= len(symbols) || at+2*insnSize > uint64(len(code)) || code[at] != insnLoad64 {
			return nil, "", fmt.Errorf("relocation at %#x is not that of a table", at)
		}
		table, err := m.Table(symbols[symbol].Name)
		if err != nil {
			return nil, "", err
		}
		code[at+1] = code[at+1]&0xf | pseudoMapFD
		binary.LittleEndian.PutUint32(code[at+4:], uint32(table.FD()))
		binary.LittleEndian.PutUint32(code[at+insnSize+4:], 0)
	}
	marked := 0
	for at := 0; at+2*insnSize <= len(code); at += insnSize {
		if code[at] != insnLoad64 {
			continue
		}
		low, high := code[at+4:at+8], code[at+insnSize+4:at+insnSize+8]
		if uint64(binary.LittleEndian.Uint32(high))<<32|uint64(binary.LittleEndian.Uint32(low)) == cookieMarker {
			binary.LittleEndian.PutUint32(low, uint32(cookie))
			binary.LittleEndian.PutUint32(high, uint32(cookie>>32))
			marked++
		}
		at += insnSize // its second half is data
	}
	if marked != 1 {
		return nil, "", fmt.Errorf("marker of the cookie found %d times", marked)
	}
	return code, license, nil
}

// progLoad is what bpf(2) takes for BPF_PROG_LOAD, as far as it is needed here.
type progLoad struct {
	kind, count    uint32
	code, license  unsafe.Pointer
	logLevel       uint32
	logSize        uint32
	log            unsafe.Pointer
	kernelVersion  uint32
	flags          uint32
	name           [16]byte
	device         uint32
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
	for range 10 {
		result, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(load)), unsafe.Sizeof(*load))
		if errno == 0 {
			return int(result), nil
		}
		err = errno
		if !errors.Is(err, unix.EAGAIN) { // a signal came; the runtime sends itself some
			break
		}
	}
	return -1, err
}

// OpenProgram opens a pinned program to read. The library's way asks the kernel whether
// programs have names, and before that for a token of every bpffs in mountinfo, which
// has several lines for each allocation of the node.
func OpenProgram(path string) (*ebpf.Program, error) {
	zeroed := append([]byte(path), 0)
	get := struct {
		path      unsafe.Pointer
		fd, flags uint32
	}{unsafe.Pointer(&zeroed[0]), 0, unix.BPF_F_RDONLY}
	var pinner runtime.Pinner // the kernel follows the pointer
	defer pinner.Unpin()
	pinner.Pin(&zeroed[0])
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_OBJ_GET, uintptr(unsafe.Pointer(&get)), unsafe.Sizeof(get))
	if errno != 0 {
		return nil, &os.PathError{Op: "open pin", Path: path, Err: errno}
	}
	return ebpf.NewProgramFromFD(int(fd))
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
