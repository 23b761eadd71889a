// SPDX-License-Identifier: MPL-2.0

package program

import (
	"fmt"
	"runtime"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// DescribeProgram asks for what is told of a program and no more: the library reads
// its code, too, and every workload has a program of its own.
func DescribeProgram(id ebpf.ProgramID) (found AttachedProgram, err error) {
	get := struct{ id, next, flags uint32 }{id: uint32(id)}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_GET_FD_BY_ID, uintptr(unsafe.Pointer(&get)), unsafe.Sizeof(get))
	if errno != 0 {
		return found, fmt.Errorf("open program %d: %w", id, errno)
	}
	defer unix.Close(int(fd))
	var tables [64]ebpf.MapID // the most that the verifier lets a program have
	var pinner runtime.Pinner // the kernel follows the pointers
	defer pinner.Unpin()
	pinner.Pin(&tables[0])
	info := programInfo{tables: uint32(len(tables)), tableIDs: unsafe.Pointer(&tables[0])}
	if err := objectInfo(int(fd), &info); err != nil {
		return found, fmt.Errorf("read program %d: %w", id, err)
	}
	found = AttachedProgram{ID: id, Name: unix.ByteSliceToString(info.name[:]), UID: info.uid}
	found.Maps = append(found.Maps, tables[:min(int(info.tables), len(tables))]...)
	return found, nil
}

// programInfo is the beginning of struct bpf_prog_info.
type programInfo struct {
	_, _        uint32 // type, ID
	_           [8]byte
	_, _        uint32 // lengths of its code
	_, _, _     uint64
	uid, tables uint32
	tableIDs    unsafe.Pointer
	name        [unix.BPF_OBJ_NAME_LEN]byte
}

// mapName is that of a map, of which the library would read more, twice.
func mapName(id ebpf.MapID) (string, error) {
	get := struct{ id, next, flags uint32 }{id: uint32(id)}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_MAP_GET_FD_BY_ID, uintptr(unsafe.Pointer(&get)), unsafe.Sizeof(get))
	if errno != 0 {
		return "", fmt.Errorf("open map %d: %w", id, errno)
	}
	defer unix.Close(int(fd))
	var info struct { // the beginning of struct bpf_map_info
		kind, id, keySize, valueSize, entries, flags uint32
		name                                         [unix.BPF_OBJ_NAME_LEN]byte
	}
	if err := objectInfo(int(fd), &info); err != nil {
		return "", fmt.Errorf("read map %d: %w", id, err)
	}
	return unix.ByteSliceToString(info.name[:]), nil
}

// objectInfo asks the kernel for what it tells of a program, a link or a map.
func objectInfo[T any](fd int, info *T) error {
	var pinner runtime.Pinner
	defer pinner.Unpin()
	pinner.Pin(info)
	about := struct {
		fd, size uint32
		info     unsafe.Pointer
	}{uint32(fd), uint32(unsafe.Sizeof(*info)), unsafe.Pointer(info)}
	if _, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_OBJ_GET_INFO_BY_FD, uintptr(unsafe.Pointer(&about)), unsafe.Sizeof(about)); errno != 0 {
		return errno
	}
	return nil
}
