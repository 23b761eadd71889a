// SPDX-License-Identifier: MPL-2.0

package program

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// cellName is the table in bpf/lookup.c that has the cookie of the program's
// namespace, a cell of 8 bytes. Each program has one of its own.
const (
	cellName  = "own_cookie"
	cellFlags = unix.BPF_F_RDONLY_PROG
)

// errCellTaken: the cell has a cookie already.
var errCellTaken = errors.New("the program is another namespace's")

// createCell makes a cell without a cookie. The library's way asks the kernel first what
// it can, by tables that it makes for that.
func createCell() (fd int, err error) {
	create := struct { // union bpf_attr of BPF_MAP_CREATE
		kind, keySize, valueSize, entries, flags, inner, node uint32
		name                                                  [unix.BPF_OBJ_NAME_LEN]byte
	}{kind: unix.BPF_MAP_TYPE_ARRAY, keySize: 4, valueSize: 8, entries: 1, flags: cellFlags}
	copy(create.name[:], cellName)
	if fd, err = bpfCall(unix.BPF_MAP_CREATE, &create); err != nil {
		return -1, fmt.Errorf("create map %s: %w", cellName, err)
	}
	return fd, nil
}

// fillCell gives a program to a namespace, for good: nobody can write to a frozen cell,
// and who froze it knows what it has then.
func fillCell(fd int, cookie uint64) error {
	if there, err := readCell(fd); err != nil || there != 0 {
		return errors.Join(err, errCellTaken)
	}
	if err := accessCell(unix.BPF_MAP_UPDATE_ELEM, fd, &cookie); err != nil {
		return err
	}
	freeze := struct{ fd uint32 }{uint32(fd)}
	if _, err := bpfCall(unix.BPF_MAP_FREEZE, &freeze); err != nil {
		return fmt.Errorf("freeze map %s: %w", cellName, err)
	}
	if there, err := readCell(fd); err != nil || there != cookie {
		return errors.Join(err, errCellTaken)
	}
	return nil
}

// readCell is the cookie of a cell; 0 where it has none yet.
func readCell(fd int) (cookie uint64, err error) {
	err = accessCell(unix.BPF_MAP_LOOKUP_ELEM, fd, &cookie)
	return cookie, err
}

func accessCell(command uintptr, fd int, value *uint64) error {
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
	if _, err := bpfCall(command, &access); err != nil {
		return fmt.Errorf("access map %s: %w", cellName, err)
	}
	return nil
}

// openCell opens the table with this ID where it is a cell.
func openCell(id uint32) (fd int, err error) {
	if fd, err = openID(unix.BPF_MAP_GET_FD_BY_ID, id); err != nil {
		return -1, fmt.Errorf("open map %d: %w", id, err)
	}
	var info mapInfo
	if err = objectInfo(fd, &info); err == nil && !info.isCell() {
		err = fmt.Errorf("map %d is not %s", id, cellName)
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

func (i mapInfo) isCell() bool {
	return i.kind == unix.BPF_MAP_TYPE_ARRAY && i.keySize == 4 && i.valueSize == 8 && i.entries == 1 && i.flags == cellFlags &&
		unix.ByteSliceToString(i.name[:]) == cellName
}
