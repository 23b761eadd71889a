// SPDX-License-Identifier: MPL-2.0

// Package cell is the table of one row that has the cookie of a lookup program's
// namespace, empty as long as the program is nobody's.
package cell

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"github.com/weirmesh/weir/redirect/bpfmap/call"
	"golang.org/x/sys/unix"
)

// Name is the table in bpf/lookup.c that has the cookie of the program's
// namespace, a cell of 8 bytes. Each program has one of its own.
const (
	Name  = "own_cookie"
	flags = unix.BPF_F_RDONLY_PROG
)

// ErrTaken: the cell has a cookie already.
var ErrTaken = errors.New("the program is another namespace's")

// Create makes a cell without a cookie. The library's way asks the kernel first what
// it can, by tables that it makes for that.
func Create() (fd int, err error) {
	create := struct { // union bpf_attr of BPF_MAP_CREATE
		kind, keySize, valueSize, entries, flags, inner, node uint32
		name                                                  [unix.BPF_OBJ_NAME_LEN]byte
	}{kind: unix.BPF_MAP_TYPE_ARRAY, keySize: 4, valueSize: 8, entries: 1, flags: flags}
	copy(create.name[:], Name)
	if fd, err = call.BPF(unix.BPF_MAP_CREATE, &create); err != nil {
		return -1, fmt.Errorf("create map %s: %w", Name, err)
	}
	return fd, nil
}

// Fill gives a program to a namespace, for good: nobody can write to a frozen cell,
// and who froze it knows what it has then.
func Fill(fd int, cookie uint64) error {
	if there, err := Read(fd); err != nil || there != 0 {
		return errors.Join(err, ErrTaken)
	}
	if err := access(unix.BPF_MAP_UPDATE_ELEM, fd, &cookie); err != nil {
		return err
	}
	freeze := struct{ fd uint32 }{uint32(fd)}
	if _, err := call.BPF(unix.BPF_MAP_FREEZE, &freeze); err != nil {
		return fmt.Errorf("freeze map %s: %w", Name, err)
	}
	if there, err := Read(fd); err != nil || there != cookie {
		return errors.Join(err, ErrTaken)
	}
	return nil
}

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
		return fmt.Errorf("access map %s: %w", Name, err)
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
		err = fmt.Errorf("map %d is not %s", id, Name)
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

func isCell(i call.MapInfo) bool {
	return i.Kind == unix.BPF_MAP_TYPE_ARRAY && i.KeySize == 4 && i.ValueSize == 8 && i.Entries == 1 && i.Flags == flags &&
		unix.ByteSliceToString(i.Name[:]) == Name
}
