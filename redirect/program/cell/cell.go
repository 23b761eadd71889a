// SPDX-License-Identifier: MPL-2.0

// Package cell reads the table of one row in which a namespace's program of v0.1.0 has its
// cookie.
package cell

import (
	"errors"
	"fmt"

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
	if cookie, err = call.Cell[uint64](fd, 0); err != nil {
		return 0, fmt.Errorf("read map %s: %w", name, err)
	}
	return cookie, nil
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
