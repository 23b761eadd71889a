// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// holder is a process that holds the lock until its input ends.
func holder(t *testing.T, path string) (pid int, release func()) {
	t.Helper()
	test.Need(t, test.Tool("flock"))
	cmd := exec.Command("flock", "--no-fork", path, "cat")
	input, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	release = func() {
		input.Close()
		_ = cmd.Wait()
	}
	t.Cleanup(release)
	test.Eventually(t, func() error {
		if err := exec.Command("flock", "--nonblock", path, "true").Run(); err == nil {
			return errors.New("nobody holds the lock")
		}
		return nil
	}, "the lock's holder")
	return cmd.Process.Pid, release
}

func TestLockThatIsNotGivenUp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state", "lock")
	ran := 0
	count := func() error { ran++; return nil }
	if err := store.Locked(path, count); err != nil {
		t.Fatal(err)
	}
	pid, release := holder(t, path)
	err := store.LockedWithin(path, 50*time.Millisecond, count)
	if !errors.Is(err, unix.EAGAIN) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), fmt.Sprintf("process %d (cat)", pid)) {
		t.Errorf("error %v: want EAGAIN that names the lock and process %d", err, pid)
	}
	waited := make(chan error, 1)
	go func() { waited <- store.Locked(path, count) }()
	release()
	if err := <-waited; err != nil {
		t.Errorf("with the lock given up: %v", err)
	}
	// The wait that was given up does not keep the lock when it gets it.
	if err := store.LockedWithin(path, 10*time.Second, count); err != nil {
		t.Error(err)
	}
	if ran != 3 {
		t.Errorf("ran %d times, want 3", ran)
	}
}
