// SPDX-License-Identifier: MPL-2.0

package test

import (
	"fmt"
	"os"
	"os/exec"
	"sync"
	"testing"
)

// HoldLock starts a process named cat that holds the lock of a file until release is
// called, or the test ends.
func HoldLock(tb testing.TB, path string) (holder *os.Process, release func()) {
	tb.Helper()
	Need(tb, Tool("flock"))
	cmd := exec.Command("flock", "--no-fork", path, "cat")
	input, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		tb.Fatalf("start the lock's holder: %v", err)
	}
	release = sync.OnceFunc(func() {
		_ = input.Close()
		_ = cmd.Wait()
	})
	tb.Cleanup(release)
	Eventually(tb, func() error {
		// flock becomes cat once it has the lock.
		name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cmd.Process.Pid))
		if err == nil && string(name) != "cat\n" {
			err = fmt.Errorf("process %d is still %q", cmd.Process.Pid, name)
		}
		return err
	}, "the lock's holder")
	return cmd.Process, release
}
