// SPDX-License-Identifier: MPL-2.0

package test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requirement is one thing a test needs and a machine may lack.
type Requirement string

const (
	// Root is user ID 0.
	Root Requirement = "root"
	// CgroupV2 is a mount of the real root of the cgroup-v2 hierarchy.
	CgroupV2 Requirement = "cgroup2"
	// BPF is a kernel that knows the bpf filesystem.
	BPF Requirement = "bpf"
	// IOUring is a kernel that lets processes use io_uring.
	IOUring Requirement = "io_uring"
)

// Tool requires a program on PATH.
func Tool(name string) Requirement { return Requirement("tool " + name) }

// quick is set by "make check": what needs root, builds programs or opens a browser is
// not run.
const quick = "WEIR_TEST_QUICK"

// Missing returns why the machine does not meet the requirement, or nil.
func (r Requirement) Missing() error {
	if os.Getenv(quick) != "" && (r == Root || r == Tool("go") || r == Tool("chromium")) {
		return fmt.Errorf("%s is set", quick)
	}
	switch r {
	case Root:
		if uid := os.Geteuid(); uid != 0 {
			return fmt.Errorf("user ID is %d, not 0", uid)
		}
		return nil
	case CgroupV2:
		_, err := cgroupRoot()
		return err
	case BPF:
		return knownFilesystem("bpf")
	case IOUring:
		return makeRing()
	case CNIPlugins:
		_, err := findPlugins()
		return err
	case DebiansFirewalld:
		_, err := findFirewalld()
		return err
	}
	if name, ok := strings.CutPrefix(string(r), "tool "); ok {
		_, err := exec.LookPath(name)
		return err
	}
	return fmt.Errorf("unknown requirement %q", string(r))
}

// Need skips the test when the machine lacks a requirement, and says which and
// why. Where CI is set in the environment a missing requirement fails the test.
func Need(tb testing.TB, needs ...Requirement) {
	tb.Helper()
	for _, need := range needs {
		err := need.Missing()
		switch {
		case err == nil:
		case os.Getenv("CI") != "":
			tb.Fatalf("needs %s, and CI must have it: %v", need, err)
		default:
			tb.Skipf("needs %s: %v", need, err)
		}
	}
}

// makeRing makes a ring and throws it away.
func makeRing() error {
	params := make([]byte, 120) // struct io_uring_params
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params[0])), 0)
	if errno != 0 {
		return fmt.Errorf("make ring: %w", errno)
	}
	return unix.Close(int(fd))
}

func knownFilesystem(name string) error {
	file, err := os.Open("/proc/filesystems")
	if err != nil {
		return err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 0 && fields[len(fields)-1] == name {
			return nil
		}
	}
	if err := lines.Err(); err != nil {
		return err
	}
	return fmt.Errorf("filesystem %s is not in /proc/filesystems", name)
}
