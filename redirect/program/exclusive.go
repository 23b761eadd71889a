// SPDX-License-Identifier: MPL-2.0

package program

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Exclusive reports whether a program keeps all others off its hook of a cgroup: it was
// attached without BPF_F_ALLOW_MULTI. A link never does.
func Exclusive(cgroup *os.File, attach ebpf.AttachType) (bool, error) {
	// union bpf_attr of BPF_PROG_QUERY; with no room for IDs the kernel counts them.
	var attr struct {
		target, attach, query, flags uint32
		ids                          uint64
		count                        uint32
		_                            [100]byte // what later kernels answer
	}
	attr.target, attr.attach = uint32(cgroup.Fd()), uint32(attach)
	if _, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_QUERY, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr)); errno != 0 {
		return false, fmt.Errorf("ask how programs are attached at %s: %w", attach, errno)
	}
	return attr.count > 0 && attr.flags&unix.BPF_F_ALLOW_MULTI == 0, nil
}

// Detach is the command that takes a program off a hook of a cgroup which it has for
// itself.
func Detach(cgroup string, attach ebpf.AttachType, id ebpf.ProgramID) string {
	name := attach.String()
	for _, h := range Hooks() {
		if h.Attach == attach {
			name = strings.TrimPrefix(h.Program, "weir_")
		}
	}
	switch attach { // bpftool's names of the others are ours
	case ebpf.AttachCGroupInet4PostBind, ebpf.AttachCGroupInet6PostBind:
		name = "post_" + name
	case ebpf.AttachCgroupInet4GetPeername, ebpf.AttachCgroupInet6GetPeername, ebpf.AttachCgroupInet6GetSockname:
		name = "get" + name
	case ebpf.AttachCGroupInetSockCreate:
		name = "sock_create"
	case ebpf.AttachCGroupSockOps:
		name = "sock_ops"
	}
	return fmt.Sprintf("bpftool cgroup detach %s %s id %d", cgroup, name, id)
}

// exclusiveError is why a link could not be attached, where somebody has the hook for
// itself.
func exclusiveError(root *os.File, attach ebpf.AttachType, err error) error {
	exclusive, ask := Exclusive(root, attach)
	if ask != nil || !exclusive {
		return errors.Join(err, ask)
	}
	list, ask := AttachedTo(root, attach)
	if ask != nil || len(list) == 0 {
		return errors.Join(err, ask)
	}
	return fmt.Errorf("%w: program %s (ID %d) has this hook for itself: have its owner attach it with BPF_F_ALLOW_MULTI, or detach it by '%s'",
		err, list[0].Name, list[0].ID, Detach(root.Name(), attach, list[0].ID))
}
