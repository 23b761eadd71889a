// SPDX-License-Identifier: MPL-2.0

// Package program loads the programs, attaches them to the cgroup root, to network
// namespaces and to nftables, and finds those that are attached. Beside bpfmap it
// is the room that knows cilium/ebpf.
package program

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// AttachAll brings the links in dir in line with the programs: a link that is
// there gets the new program without a moment without one, a link whose cgroup
// died or was detached is made anew, a missing one is made. Programs of others
// on the same hooks stay: bpf_link attaches beside them (Linux 5.7).
func AttachAll(programs map[string]*ebpf.Program, specs map[string]*ebpf.ProgramSpec, root *os.File, dir string) (repairs []Repair, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create pin directory: %w", err)
	}
	rootID, err := CgroupID(root)
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, len(programs))
	for name := range programs {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		what, err := attachOne(programs[name], specs[name].AttachType, root, rootID, filepath.Join(dir, name))
		if err != nil {
			return repairs, fmt.Errorf("attach %s: %w", name, err)
		}
		repairs = append(repairs, Repair{what, name})
	}
	return repairs, nil
}

func attachOne(prog *ebpf.Program, hook ebpf.AttachType, root *os.File, rootID uint64, pin string) (RepairKind, error) {
	kind := Attached
	pinned, err := link.LoadPinnedLink(pin, nil)
	switch {
	case err == nil:
		defer pinned.Close()
		if onCgroup(pinned, rootID) {
			err := pinned.Update(prog)
			if err == nil {
				return Updated, nil
			}
			// ENOLINK: detached, or its cgroup is gone.
			if !errors.Is(err, unix.ENOLINK) {
				return 0, fmt.Errorf("update link: %w", err)
			}
		}
		kind = Reattached
		if err := os.Remove(pin); err != nil {
			return 0, fmt.Errorf("remove stale link: %w", err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return 0, fmt.Errorf("open link: %w", err)
	}
	fresh, err := link.AttachRawLink(link.RawLinkOptions{Target: int(root.Fd()), Program: prog, Attach: hook})
	if errors.Is(err, unix.EPERM) {
		return 0, exclusiveError(root, hook, err)
	}
	if err != nil {
		return 0, err
	}
	defer fresh.Close()
	if err := fresh.Pin(pin); err != nil {
		return 0, fmt.Errorf("pin link: %w", err)
	}
	return kind, nil
}

// onCgroup reports whether a link is attached to that cgroup now.
func onCgroup(l link.Link, id uint64) bool {
	info, err := l.Info()
	if err != nil {
		return false
	}
	cgroup := info.Cgroup()
	return cgroup != nil && cgroup.CgroupId == id
}

// CgroupID is what bpf_get_current_cgroup_id returns in that cgroup: the inode
// number of its directory (64-bit kernfs inodes, Linux 5.5).
func CgroupID(dir *os.File) (uint64, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &stat); err != nil {
		return 0, fmt.Errorf("stat cgroup: %w", err)
	}
	return stat.Ino, nil
}

// LinkProblems says which of the named links are not in force at the root, and
// why, by name.
func LinkProblems(names []string, root *os.File, dir string) (map[string]string, error) {
	rootID, err := CgroupID(root)
	if err != nil {
		return nil, err
	}
	problems := make(map[string]string)
	for _, name := range names {
		at, err := attachedTo(filepath.Join(dir, name), unix.BPF_LINK_TYPE_CGROUP)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			problems[name] = name + " is not attached: its pin is gone"
		case err != nil:
			return nil, fmt.Errorf("open link %s: %w", name, err)
		case at != rootID:
			problems[name] = name + " is not attached to the root of cgroup v2"
		}
	}
	return problems, nil
}
