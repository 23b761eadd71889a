// SPDX-License-Identifier: MPL-2.0

package program

import (
	"fmt"

	"github.com/weirmesh/weir/redirect/bpfmap/call"
	"golang.org/x/sys/unix"
)

// attachedTo is what a pinned link is attached to: the ID of a cgroup or the inode of a
// network namespace; 0 once it is attached no more, or where it is of another kind. The
// agent asks this of every workload time and again, and these are the three system calls
// that it takes: the library makes a dozen.
func attachedTo(pin string, kind uint32) (uint64, error) {
	fd, err := call.OpenPin(pin, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	var info struct { // struct bpf_link_info
		kind, id, program, _ uint32
		target               [2]uint64
	}
	if err := call.ObjectInfo(fd, &info); err != nil {
		return 0, fmt.Errorf("read link %s: %w", pin, err)
	}
	switch {
	case info.kind != kind:
		return 0, nil
	case kind == unix.BPF_LINK_TYPE_NETNS:
		return info.target[0] & 0xffffffff, nil // its second half is the hook
	}
	return info.target[0], nil
}

// LookupAt is the inode of the namespace that a pinned lookup program is attached to; 0
// where none is pinned, or somebody detached it, or its namespace is gone.
func LookupAt(pin string) uint64 {
	inode, err := attachedTo(pin, unix.BPF_LINK_TYPE_NETNS)
	if err != nil {
		return 0
	}
	return inode
}
