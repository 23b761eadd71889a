// SPDX-License-Identifier: MPL-2.0

package test

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// BPFFS mounts a bpf filesystem of the test's own and returns its directory. With
// the mount go the pins in it, and what only they held.
func BPFFS(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "weir-bpffs-")
	if err != nil {
		tb.Fatalf("make directory for bpffs: %v", err)
	}
	tb.Cleanup(func() {
		// Not RemoveAll: below a mount that stayed it would take pins one by one.
		if err := os.Remove(dir); err != nil {
			tb.Errorf("remove bpffs directory: %v", err)
		}
	})
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0700"); err != nil {
		tb.Fatalf("mount bpffs: %v", err)
	}
	tb.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			tb.Errorf("unmount bpffs: %v", err)
		}
	})
	return dir
}
