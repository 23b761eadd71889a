// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

func TestLockThatIsNotGivenUp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state", "lock")
	ran := 0
	count := func() error { ran++; return nil }
	if err := store.Locked(t.Context(), path, count); err != nil {
		t.Fatal(err)
	}
	holder, release := test.HoldLock(t, path)
	err := store.LockedWithin(t.Context(), path, 50*time.Millisecond, count)
	if !errors.Is(err, unix.EAGAIN) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), fmt.Sprintf("process %d (cat)", holder.Pid)) {
		t.Errorf("error %v: want EAGAIN that names the lock and process %d", err, holder.Pid)
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
	holder, release := test.HoldLock(t, path)
	waited := make(chan error, 1)
	go func() { waited <- store.Locked(ctx, path, count) }()
	cancel()
	err := <-waited
	if !errors.Is(err, context.Canceled) || errors.Is(err, unix.EAGAIN) || !strings.Contains(err.Error(), fmt.Sprintf("process %d (cat)", holder.Pid)) {
		t.Errorf("error %v: want %v that names process %d", err, context.Canceled, holder.Pid)
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
	test.HoldLock(t, paths.Lock())
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
