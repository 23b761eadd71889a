// SPDX-License-Identifier: MPL-2.0

// Package call calls bpf(2) itself, where the library asks the kernel for more than is
// needed.
package call

import (
	"errors"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MapInfo is the beginning of struct bpf_map_info.
type MapInfo struct {
	Kind, ID, KeySize, ValueSize, Entries, Flags uint32
	Name                                         [unix.BPF_OBJ_NAME_LEN]byte
}

// ObjectInfo asks the kernel for what it tells of a program, a link or a map.
func ObjectInfo[T any](fd int, info *T) error {
	var pinner runtime.Pinner
	defer pinner.Unpin()
	pinner.Pin(info)
	about := struct {
		fd, size uint32
		info     unsafe.Pointer
	}{uint32(fd), uint32(unsafe.Sizeof(*info)), unsafe.Pointer(info)}
	_, err := BPF(unix.BPF_OBJ_GET_INFO_BY_FD, &about)
	return err
}

// OpenPin opens what is pinned at a path. The library asks the kernel first what it can, and
// for a token of every bpffs in mountinfo, which has several lines for each allocation.
func OpenPin(path string, flags uint32) (fd int, err error) {
	zeroed := append([]byte(path), 0)
	get := struct {
		path      unsafe.Pointer
		fd, flags uint32
	}{unsafe.Pointer(&zeroed[0]), 0, flags}
	var pinner runtime.Pinner
	defer pinner.Unpin()
	pinner.Pin(&zeroed[0])
	if fd, err = BPF(unix.BPF_OBJ_GET, &get); err != nil {
		return -1, &os.PathError{Op: "open pin", Path: path, Err: err}
	}
	return fd, nil
}

// Cell reads the value under a number of a table: of a table of programs it is the ID of one.
func Cell[T any](fd int, key uint32) (value T, err error) {
	err = element(unix.BPF_MAP_LOOKUP_ELEM, fd, &key, &value)
	return value, err
}

// SetCell writes it; of a table of programs it is a descriptor.
func SetCell[T any](fd int, key uint32, value T) error {
	return element(unix.BPF_MAP_UPDATE_ELEM, fd, &key, &value)
}

func element[T any](command uintptr, fd int, key *uint32, value *T) error {
	var pinner runtime.Pinner
	defer pinner.Unpin()
	pinner.Pin(key)
	pinner.Pin(value)
	access := struct {
		fd, _      uint32
		key, value unsafe.Pointer
		flags      uint64
	}{fd: uint32(fd), key: unsafe.Pointer(key), value: unsafe.Pointer(value)}
	_, err := BPF(command, &access)
	return err
}

// OpenID opens a program or a map by its ID.
func OpenID(command uintptr, id uint32) (fd int, err error) {
	get := struct{ id, next, flags uint32 }{id: id}
	return BPF(command, &get)
}

// BPF calls bpf(2). The caller has pinned what the attributes point to.
func BPF[T any](command uintptr, attributes *T) (result int, err error) {
	for range 10 {
		r, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(unsafe.Pointer(attributes)), unsafe.Sizeof(*attributes))
		if errno == 0 {
			return int(r), nil
		}
		err = errno
		if !errors.Is(err, unix.EAGAIN) { // a signal came; the runtime sends itself some
			break
		}
	}
	return -1, err
}
