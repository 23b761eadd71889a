// SPDX-License-Identifier: MPL-2.0

package ended

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"github.com/weirmesh/weir/redirect/host"
	"golang.org/x/sys/unix"
)

// netInterface is told from any other by name and hardware address.
type netInterface struct{ name, mac string }

// namespaceUsers are the network namespaces in which processes are.
type namespaceUsers struct {
	leaders map[uint64][]string // ways to each by the first thread of a process, by inode
	threads map[uint64][]string // ... by any thread; nil as long as nobody asked
	spaces  []space
	looked  bool // spaces are known
}

// space is what a namespace is known by where no path leads to it.
type space struct {
	cookie     uint64
	interfaces []netInterface
	addresses  []netip.Addr
}

// findNamespaceUsers looks at every process of the machine. Where a process has several
// threads they are looked at only for a namespace in which no process is by its first one:
// there are many of them on a full node, and hardly ever is one elsewhere.
func findNamespaceUsers() (*namespaceUsers, error) {
	processes, err := numbersIn("/proc")
	if err != nil {
		return nil, err
	}
	leaders, err := namespacesOf(processes)
	return &namespaceUsers{leaders: leaders}, err
}

// numbersIn are the directories of processes or threads in one of /proc. Where a process
// has ended there is none.
func numbersIn(dir string) (paths []string, err error) {
	file, err := os.Open(dir)
	if gone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look at process: %w", err)
	}
	defer file.Close()
	names, err := file.Readdirnames(-1)
	if err != nil && !gone(err) {
		return nil, fmt.Errorf("look at process: %w", err)
	}
	for _, name := range names {
		if name[0] >= '0' && name[0] <= '9' {
			paths = append(paths, filepath.Join(dir, name))
		}
	}
	return paths, nil
}

// namespacesOf are the namespaces of processes or threads, by inode. One that may not be
// looked at is an error, as it may be where it matters; but for init, which is no task.
func namespacesOf(threads []string) (map[uint64][]string, error) {
	list := make(map[uint64][]string)
	for _, thread := range threads {
		path := filepath.Join(thread, "ns/net")
		inode, found, err := inodeOf(path)
		if errors.Is(err, fs.ErrPermission) && strings.HasPrefix(path, "/proc/1/") {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look at process: %w", err)
		}
		if found { // else it has ended
			list[inode] = append(list[inode], path)
		}
	}
	return list, nil
}

// in reports whether a thread is in the namespace of an inode.
func (u *namespaceUsers) in(inode uint64) (bool, error) {
	if len(u.leaders[inode]) > 0 {
		return true, nil
	}
	err := u.findThreads()
	return len(u.threads[inode]) > 0, err
}

// findThreads looks at every thread of the machine, once; but for those that this
// program, as a command or as the agent, sends into a namespace to look at it: they are
// out again in a moment, and no task's. Its first thread is never sent.
func (u *namespaceUsers) findThreads() error {
	if u.threads != nil {
		return nil
	}
	processes, err := numbersIn("/proc")
	if err != nil {
		return err
	}
	own, err := os.Stat("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("look at process: %w", err)
	}
	var threads []string
	for _, process := range processes {
		if isProgram(process, own) {
			threads = append(threads, process)
			continue
		}
		each, err := numbersIn(filepath.Join(process, "task"))
		if err != nil {
			return err
		}
		threads = append(threads, each...)
	}
	u.threads, err = namespacesOf(threads)
	return err
}

// isProgram reports whether a process runs a program. A kernel thread runs none, and one
// that may not be asked is taken for another's.
func isProgram(process string, program os.FileInfo) bool {
	file, err := os.Stat(filepath.Join(process, "exe"))
	return err == nil && os.SameFile(file, program)
}

// look enters each namespace, once.
func (u *namespaceUsers) look() error {
	if u.looked {
		return nil
	}
	if err := u.findThreads(); err != nil {
		return err
	}
	for _, threads := range u.threads {
		s, err := lookAtOne(threads)
		if err != nil {
			return err
		}
		u.spaces = append(u.spaces, s)
	}
	u.looked = true
	return nil
}

// of says what is left of an attachment's namespace, or ErrInUse.
func (u *namespaceUsers) of(a *Attachment) (State, error) {
	if a.unread != nil {
		return "", a.unread
	}
	state := Gone
	for _, path := range a.paths {
		inode, found, err := inodeOf(path)
		if err != nil {
			return "", err
		}
		if !found {
			continue
		}
		used, err := u.in(inode)
		if err != nil {
			return "", err
		}
		if used {
			return "", fmt.Errorf("namespace %s: %w", path, ErrInUse)
		}
		state = Empty
	}
	if a.mount != "" {
		state = Empty // also where the mount is to be seen from elsewhere alone
	}
	if err := u.look(); err != nil {
		return "", err
	}
	if slices.ContainsFunc(u.spaces, a.has) {
		return "", fmt.Errorf("a process is in its namespace, to which no path leads any more: %w", ErrInUse)
	}
	return state, nil
}

// has reports whether a namespace is, or was made to be, the attachment's.
func (a *Attachment) has(s space) bool {
	return slices.Contains(a.cookies, s.cookie) ||
		slices.ContainsFunc(a.interfaces, func(i netInterface) bool { return slices.Contains(s.interfaces, i) }) ||
		slices.ContainsFunc(a.addresses, func(addr netip.Addr) bool { return slices.Contains(s.addresses, addr) })
}

// lookAtOne looks at a namespace by the first of its paths that still leads there.
func lookAtOne(paths []string) (s space, err error) {
	for _, path := range paths {
		s, err = look(path)
		if !errors.Is(err, host.ErrNetNSGone) {
			break
		}
	}
	if errors.Is(err, host.ErrNetNSGone) || errors.Is(err, host.ErrHostNetNS) {
		return space{}, nil // all of its processes have ended, or it is no allocation's
	}
	return s, err
}

func look(path string) (s space, err error) {
	if s.cookie, err = host.Cookie(path); err != nil {
		return s, err
	}
	handle, err := netns.GetFromPath(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, host.ErrNetNSGone
	}
	if err != nil {
		return s, fmt.Errorf("open namespace %s: %w", path, err)
	}
	defer handle.Close()
	socket, err := netlink.NewHandleAt(handle, unix.NETLINK_ROUTE)
	if err != nil {
		return s, fmt.Errorf("enter namespace %s: %w", path, err)
	}
	defer socket.Close()
	links, err := socket.LinkList()
	if err != nil {
		return s, fmt.Errorf("list interfaces in %s: %w", path, err)
	}
	for _, link := range links {
		s.interfaces = append(s.interfaces, netInterface{link.Attrs().Name, link.Attrs().HardwareAddr.String()})
	}
	addresses, err := socket.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return s, fmt.Errorf("list addresses in %s: %w", path, err)
	}
	for _, entry := range addresses {
		if addr, ok := netip.AddrFromSlice(entry.IP); ok && !entry.IP.IsLoopback() {
			s.addresses = append(s.addresses, addr.Unmap())
		}
	}
	return s, nil
}

// inodeOf identifies the namespace that a path leads to; found is false where it
// leads to none: what is left of one that died is an empty file.
func inodeOf(path string) (inode uint64, found bool, err error) {
	var disk unix.Statfs_t
	var file unix.Stat_t
	for _, look := range []func() error{
		func() error { return unix.Statfs(path, &disk) }, func() error { return unix.Stat(path, &file) },
	} {
		err := look()
		if gone(err) {
			return 0, false, nil
		}
		if err != nil {
			return 0, false, &os.PathError{Op: "stat", Path: path, Err: err}
		}
	}
	return file.Ino, disk.Type == unix.NSFS_MAGIC, nil
}

// gone reports whether an error says that what a path led to is not there.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ESRCH)
}
