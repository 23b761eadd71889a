// SPDX-License-Identifier: MPL-2.0

// Package cell reads the table of one row in which a namespace's program of v0.1.0 has its
// cookie.
package cell

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"github.com/weirmesh/weir/redirect/bpfmap/call"
	"golang.org/x/sys/unix"
)

// Of the table. Each of those programs has one.
const (
	name  = "own_cookie"
	flags = unix.BPF_F_RDONLY_PROG
)

// Read is the cookie of a cell; 0 where it has none yet.
func Read(fd int) (cookie uint64, err error) {
	err = access(unix.BPF_MAP_LOOKUP_ELEM, fd, &cookie)
	return cookie, err
}

func access(command uintptr, fd int, value *uint64) error {
	var key uint32
	var pinner runtime.Pinner // the kernel follows the pointers
	defer pinner.Unpin()
	pinner.Pin(&key)
	pinner.Pin(value)
	access := struct {
		fd, _      uint32
		key, value unsafe.Pointer
		flags      uint64
	}{fd: uint32(fd), key: unsafe.Pointer(&key), value: unsafe.Pointer(value)}
	if _, err := call.BPF(command, &access); err != nil {
		return fmt.Errorf("access map %s: %w", name, err)
	}
	return nil
}

// Open opens the table with this ID where it is a cell.
func Open(id uint32) (fd int, err error) {
	if fd, err = call.OpenID(unix.BPF_MAP_GET_FD_BY_ID, id); err != nil {
		return -1, fmt.Errorf("open map %d: %w", id, err)
	}
	var info call.MapInfo
	if err = call.ObjectInfo(fd, &info); err == nil && !isCell(info) {
		err = fmt.Errorf("map %d is not %s", id, name)
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

func isCell(i call.MapInfo) bool {
	return i.Kind == unix.BPF_MAP_TYPE_ARRAY && i.KeySize == 4 && i.ValueSize == 8 && i.Entries == 1 && i.Flags == flags &&
		unix.ByteSliceToString(i.Name[:]) == name
}
