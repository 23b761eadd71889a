// SPDX-License-Identifier: MPL-2.0

package test

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Cgroup is a cgroup-v2 group that a test made.
type Cgroup struct {
	// Path is the group's directory.
	Path string
	// ID is what bpf_get_current_cgroup_id returns for a process in the group.
	ID uint64
}

// CgroupRoot returns where the real root of the cgroup-v2 hierarchy is mounted.
func CgroupRoot(tb testing.TB) string {
	tb.Helper()
	root, err := cgroupRoot()
	if err != nil {
		tb.Fatalf("find cgroup root: %v", err)
	}
	return root
}

// NewCgroup makes a group below the real root. When the test ends the processes
// left in the group are killed and the group is removed.
func NewCgroup(tb testing.TB) *Cgroup {
	tb.Helper()
	path, err := os.MkdirTemp(CgroupRoot(tb), "weir-test-")
	if err != nil {
		tb.Fatalf("make cgroup: %v", err)
	}
	return newCgroup(tb, path)
}

// Child makes a group inside the group.
func (c *Cgroup) Child(tb testing.TB, name string) *Cgroup {
	tb.Helper()
	path := filepath.Join(c.Path, name)
	if err := os.Mkdir(path, 0o755); err != nil {
		tb.Fatalf("make cgroup: %v", err)
	}
	return newCgroup(tb, path)
}

func newCgroup(tb testing.TB, path string) *Cgroup {
	tb.Helper()
	tb.Cleanup(func() { removeCgroup(tb, path) })
	id, err := cgroupID(path)
	if err != nil {
		tb.Fatalf("read ID of cgroup %s: %v", path, err)
	}
	return &Cgroup{Path: path, ID: id}
}

func removeCgroup(tb testing.TB, path string) {
	tb.Helper()
	// A kernel before 5.14 has no cgroup.kill: there the processes must end by
	// themselves, and the wait below says so when they do not.
	err := os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		tb.Errorf("kill cgroup %s: %v", path, err)
	}
	Eventually(tb, func() error {
		if err := unix.Rmdir(path); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
		return nil
	}, "removal of cgroup "+path)
}

// cgroupRoot returns the mount of cgroup2 whose root is the hierarchy's own: the
// root group is the only one without a cgroup.type file, also when a cgroup
// namespace shows another group as "/".
func cgroupRoot() (string, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		mount, filesystem, ok := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(mount)
		if !ok || len(fields) < 5 || fields[3] != "/" || !strings.HasPrefix(filesystem, "cgroup2 ") {
			continue
		}
		if _, err := os.Stat(filepath.Join(fields[4], "cgroup.type")); errors.Is(err, os.ErrNotExist) {
			return fields[4], nil
		}
	}
	if err := lines.Err(); err != nil {
		return "", err
	}
	return "", errors.New("no mount of the cgroup-v2 root in /proc/self/mountinfo")
}

func cgroupID(path string) (uint64, error) {
	handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, path, 0)
	if err != nil {
		return 0, err
	}
	if handle.Size() != 8 {
		return 0, fmt.Errorf("handle of %d bytes, not 8", handle.Size())
	}
	return binary.NativeEndian.Uint64(handle.Bytes()), nil
}
