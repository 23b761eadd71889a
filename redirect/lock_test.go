// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"context"
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
	if err := store.Locked(t.Context(), path, count); err != nil {
		t.Fatal(err)
	}
	pid, release := holder(t, path)
	err := store.LockedWithin(t.Context(), path, 50*time.Millisecond, count)
	if !errors.Is(err, unix.EAGAIN) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), fmt.Sprintf("process %d (cat)", pid)) {
		t.Errorf("error %v: want EAGAIN that names the lock and process %d", err, pid)
	}
	waited := make(chan error, 1)
	go func() { waited <- store.Locked(t.Context(), path, count) }()
	release()
	if err := <-waited; err != nil {
		t.Errorf("with the lock given up: %v", err)
	}
	// The wait that was given up does not keep the lock when it gets it.
	if err := store.LockedWithin(t.Context(), path, 10*time.Second, count); err != nil {
		t.Error(err)
	}
	if ran != 3 {
		t.Errorf("ran %d times, want 3", ran)
	}
}

// Who no longer waits gets an answer at once, which names the holder; nothing was done,
// and a lock that is free is taken all the same.
func TestLockThatNobodyWaitsForAnyMore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state", "lock")
	ctx, cancel := context.WithCancel(t.Context())
	ran := 0
	count := func() error { ran++; return nil }
	if err := store.Locked(ctx, path, count); err != nil {
		t.Fatal(err)
	}
	pid, release := holder(t, path)
	waited := make(chan error, 1)
	go func() { waited <- store.Locked(ctx, path, count) }()
	cancel()
	err := <-waited
	if !errors.Is(err, context.Canceled) || errors.Is(err, unix.EAGAIN) || !strings.Contains(err.Error(), fmt.Sprintf("process %d (cat)", pid)) {
		t.Errorf("error %v: want %v that names process %d", err, context.Canceled, pid)
	}
	release()
	// The wait that was given up gets the lock, and gives it back.
	if err := store.Locked(t.Context(), path, count); err != nil {
		t.Error(err)
	}
	if err := store.Locked(ctx, path, count); err != nil || ran != 3 {
		t.Errorf("a lock that is free: %v, ran %d times; want it taken, 3", err, ran)
	}
}

// A change that waits for another process's ends with its context, and has done nothing.
func TestChangeIsGivenUpWithItsContext(t *testing.T) {
	test.Need(t, test.Root)
	paths := store.Paths{PinDir: filepath.Join(t.TempDir(), "pins"), StateDir: t.TempDir()}
	holder(t, paths.Lock())
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := New(paths).Until(ctx).Unload()
		ended <- err
	}()
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("unload: %v, want %v", err, context.Canceled)
	}
}
