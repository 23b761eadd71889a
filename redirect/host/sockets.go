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
// closes, and the cgroup of the process that it is copied from. processes may be nil.
func (ns *Namespace) CopySocket(inode uint32, cgroupRoot string, processes *Processes) (fd int, cgroup uint64, err error) {
	if processes == nil {
		processes = new(Processes)
	}
	err = processes.eachOwner(ns, inode, func(pid, number int) (done bool, err error) {
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
// and the descriptors by which they do, until it is done; ErrNoOwner where it
// never is.
func (ns *Namespace) EachOwner(inode uint32, visit func(pid, number int) (done bool, err error)) error {
	return new(Processes).eachOwner(ns, inode, visit)
}

// eachDescriptor calls visit with those descriptors of a process that are the socket.
func eachDescriptor(pid int, socket uint32, visit func(pid, number int) (done bool, err error)) (done bool, err error) {
	want := fmt.Sprintf("socket:[%d]", socket)
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return false, nil // it ended
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
			return done, err
		}
	}
	return false, nil
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
