// SPDX-License-Identifier: MPL-2.0

package program

import (
	"fmt"
	"runtime"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap/call"
	"golang.org/x/sys/unix"
)

// DescribeProgram asks for what is told of a program and no more: the library reads
// its code, too, and every workload has a program of its own.
func DescribeProgram(id ebpf.ProgramID) (found AttachedProgram, err error) {
	fd, err := call.OpenID(unix.BPF_PROG_GET_FD_BY_ID, uint32(id))
	if err != nil {
		return found, fmt.Errorf("open program %d: %w", id, err)
	}
	defer unix.Close(fd)
	if found, err = describeFD(fd); err != nil {
		return found, fmt.Errorf("read program %d: %w", id, err)
	}
	return found, nil
}

func describeFD(fd int) (found AttachedProgram, err error) {
	var tables [64]ebpf.MapID // the most that the verifier lets a program have
	var pinner runtime.Pinner // the kernel follows the pointers
	defer pinner.Unpin()
	pinner.Pin(&tables[0])
	info := programInfo{tables: uint32(len(tables)), tableIDs: unsafe.Pointer(&tables[0])}
	if err := call.ObjectInfo(fd, &info); err != nil {
		return found, err
	}
	found = AttachedProgram{ID: ebpf.ProgramID(info.id), Name: unix.ByteSliceToString(info.name[:]), UID: info.uid, kind: info.kind, tag: info.tag}
	found.Maps = append(found.Maps, tables[:min(int(info.tables), len(tables))]...)
	return found, nil
}

// programInfo is the beginning of struct bpf_prog_info.
type programInfo struct {
	kind, id    uint32
	tag         [8]byte
	_, _        uint32 // lengths of its code
	_, _, _     uint64
	uid, tables uint32
	tableIDs    unsafe.Pointer
	name        [unix.BPF_OBJ_NAME_LEN]byte
}

// mapName is that of a map, of which the library would read more, twice.
func mapName(id ebpf.MapID) (string, error) {
	fd, err := call.OpenID(unix.BPF_MAP_GET_FD_BY_ID, uint32(id))
	if err != nil {
		return "", fmt.Errorf("open map %d: %w", id, err)
	}
	defer unix.Close(fd)
	var info call.MapInfo
	if err := call.ObjectInfo(fd, &info); err != nil {
		return "", fmt.Errorf("read map %d: %w", id, err)
	}
	return unix.ByteSliceToString(info.Name[:]), nil
}
