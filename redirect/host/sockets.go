// SPDX-License-Identifier: MPL-2.0

package host

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

var ErrNoOwner = errors.New("no process has the socket")

// CopySocket returns a copy of the descriptor of a socket, which the caller
// closes, and the cgroup of the process that it is copied from.
func (ns *Namespace) CopySocket(inode uint32, cgroupRoot string) (fd int, cgroup uint64, err error) {
	err = ns.EachOwner(inode, func(pid, number int) (done bool, err error) {
		fd, err = copyDescriptor(pid, number)
		if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EBADF) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		if cgroup, err = processCgroup(pid, cgroupRoot); err != nil {
			unix.Close(fd)
		}
		return true, err
	})
	if err != nil {
		return -1, 0, err
	}
	return fd, cgroup, nil
}

// EachOwner calls visit with the processes of the namespace that hold a socket,
// and the descriptors by which they do, until it is done; errNoOwner where it
// never is.
func (ns *Namespace) EachOwner(inode uint32, visit func(pid, number int) (done bool, err error)) error {
	want := fmt.Sprintf("socket:[%d]", inode)
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return fmt.Errorf("list processes: %w", err)
	}
	for _, process := range processes {
		pid, err := strconv.Atoi(process.Name())
		if err != nil || !ns.holds(pid) {
			continue
		}
		dir := filepath.Join("/proc", process.Name(), "fd")
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue // it ended
		}
		for _, entry := range fds {
			if target, err := os.Readlink(filepath.Join(dir, entry.Name())); err != nil || target != want {
				continue
			}
			number, err := strconv.Atoi(entry.Name())
			if err != nil {
				continue
			}
			if done, err := visit(pid, number); done || err != nil {
				return err
			}
		}
	}
	return ErrNoOwner
}

func (ns *Namespace) holds(pid int) bool {
	var stat unix.Stat_t
	return unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &stat) == nil && stat.Ino == ns.Inode
}

func copyDescriptor(pid, number int) (int, error) {
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", pid, err)
	}
	defer unix.Close(process)
	fd, err := unix.PidfdGetfd(process, number, 0)
	if err != nil {
		return -1, fmt.Errorf("copy descriptor %d of process %d: %w", number, pid, err)
	}
	return fd, nil
}
