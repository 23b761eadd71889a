// SPDX-License-Identifier: MPL-2.0

// Package sysctl reads and sets keys of /proc/sys of the network namespace that the
// calling thread is in.
//
// The same key of every namespace is in one chain of the kernel's cache of directory
// entries, and who asks for that of a new namespace walks past those of all others that
// somebody asked for: 10 ms among 4,000. An instance of procfs has a chain of its own.
package sysctl

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Crowded is from how many namespaces on an instance of procfs of one's own pays: it
// costs a quarter of a millisecond.
const Crowded = 256

// Keys are those of one instance of procfs.
type Keys struct {
	root int // of the instance; -1: /proc
}

// Shared are the keys of /proc. They need no Close.
func Shared() *Keys { return &Keys{root: -1} }

// Own are the keys of an instance of procfs that is mounted nowhere and goes with Close
// (Linux 5.2). Where it cannot be had, as without CAP_SYS_ADMIN, they are those of /proc.
func Own() *Keys {
	context, err := unix.Fsopen("proc", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return Shared()
	}
	defer unix.Close(context)
	if err := unix.FsconfigCreate(context); err != nil {
		return Shared()
	}
	root, err := unix.Fsmount(context, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return Shared()
	}
	return &Keys{root: root}
}

// entrySize is what an entry adds to the size of a directory of tmpfs, in bytes, which is
// that of two where it is empty: to count 256 names takes twice what the instance does. On other filesystems a size says less, but
// nothing goes wrong where it misleads.
const entrySize = 20 // BOGO_DIRENT_SIZE, mm/shmem.c, Linux 6.12

// Among are the keys that are read the fastest on a node whose namespaces have an entry
// each in the directory, which is on a tmpfs.
func Among(dir string) *Keys {
	info, err := os.Stat(dir)
	if err != nil || info.Size() < (2+Crowded)*entrySize {
		return Shared()
	}
	return Own()
}

// IsOwn reports whether the instance is not /proc.
func (k *Keys) IsOwn() bool { return k.root >= 0 }

// Close gives the instance up.
func (k *Keys) Close() error {
	if !k.IsOwn() {
		return nil
	}
	root := k.root
	k.root = -1
	return unix.Close(root)
}

// Read returns the value of a key, whose parts are in the order of its path below
// /proc/sys. A key that the kernel does not have is fs.ErrNotExist.
func (k *Keys) Read(key ...string) (value string, err error) {
	file, err := k.open(unix.O_RDONLY, key)
	if err != nil {
		return "", fmt.Errorf("read sysctl: %w", err)
	}
	text, err := io.ReadAll(file)
	if err = errors.Join(err, file.Close()); err != nil {
		return "", fmt.Errorf("read sysctl: %w", err)
	}
	return strings.TrimSpace(string(text)), nil
}

// Write sets a key.
func (k *Keys) Write(value string, key ...string) error {
	file, err := k.open(unix.O_WRONLY, key)
	if err != nil {
		return fmt.Errorf("set sysctl to %s: %w", value, err)
	}
	_, err = file.WriteString(value)
	if err = errors.Join(err, file.Close()); err != nil {
		return fmt.Errorf("set sysctl to %s: %w", value, err)
	}
	return nil
}

// Set sets a key and reports whether it differed. One that the kernel does not have, as on
// a node without IPv6, is left alone.
func (k *Keys) Set(value string, key ...string) (changed bool, err error) {
	now, err := k.Read(key...)
	if errors.Is(err, fs.ErrNotExist) || err == nil && now == value {
		return false, nil
	}
	if err == nil {
		err = k.Write(value, key...)
	}
	return err == nil, err
}

func (k *Keys) open(how int, key []string) (*os.File, error) {
	path := filepath.Join(append([]string{"/proc/sys"}, key...)...)
	if !k.IsOwn() {
		return os.OpenFile(path, how, 0)
	}
	below := strings.TrimPrefix(path, "/proc/")
	fd, err := unix.Openat(k.root, below, how|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}
