// SPDX-License-Identifier: MPL-2.0

package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/weirmesh/weir/redirect/host"
	"golang.org/x/sys/unix"
)

// LockTimeout is how long a call waits for another process's change. One takes
// milliseconds, an upgrade with thousands of workloads seconds. Nobody may wait
// forever: Nomad makes no other network meanwhile, and tells nobody.
const LockTimeout = time.Minute

// CheckTimeout is that of a check. Nomad makes one for each allocation when its
// client starts, and a check that cannot look is no error.
const CheckTimeout = 10 * time.Second

// Locked runs action while no other process does so with the same file, which is
// made where it is not there. A lock that is not given up is an error, which is
// EAGAIN and names the holder; one that ctx no longer waits for is its error. ctx is
// for the wait alone: a lock that is free is taken, and what has begun is finished.
func Locked(ctx context.Context, path string, action func() error) error {
	return LockedWithin(ctx, path, LockTimeout, action)
}

// LockedWithin is Locked for who waits for another time than LockTimeout.
func LockedWithin(ctx context.Context, path string, timeout time.Duration, action func() error) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("create state directory: %w", err)
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("open lock: %w", err)
	}
	err = flock(file, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		taken := make(chan error, 1)
		go func() { taken <- flock(file, unix.LOCK_EX) }()
		select {
		case err = <-taken:
		case <-ctx.Done():
			giveUp(file, taken)
			holder, _ := LockedBy(path)
			return fmt.Errorf("take lock %s: %s has it: %w", path, holder, ctx.Err())
		case <-time.After(timeout):
			giveUp(file, taken)
			holder, _ := LockedBy(path)
			return fmt.Errorf("take lock %s: %s has it for more than %s: %w", path, holder, timeout, unix.EAGAIN)
		}
	}
	defer file.Close()
	if err != nil {
		return fmt.Errorf("take lock %s: %w", path, err)
	}
	return action()
}

// giveUp releases the lock whenever it comes: nobody wants it any more.
func giveUp(file *os.File, taken <-chan error) {
	go func() { _ = errors.Join(<-taken, file.Close()) }()
}

func flock(file *os.File, how int) error {
	for {
		err := unix.Flock(int(file.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// lockHolder is who holds a lock, as far as it can be seen from here.
type lockHolder int // its process ID; 0: not known

func (h lockHolder) String() string {
	if h <= 0 {
		return "another process"
	}
	return host.ProcessName(int(h))
}

// Stopped reports whether the process is stopped, by a signal or a debugger.
func (h lockHolder) Stopped() bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", int(h)))
	_, state, found := strings.Cut(string(text), ") ") // "1234 (weir) T 1 ..."
	return h > 0 && err == nil && found && (strings.HasPrefix(state, "T") || strings.HasPrefix(state, "t"))
}

// LockedBy reports whether somebody has the lock now, and who, without taking it.
func LockedBy(path string) (holder lockHolder, held bool) {
	var stat unix.Stat_t
	text, err := os.ReadFile("/proc/locks")
	if err != nil || unix.Stat(path, &stat) != nil {
		return 0, false
	}
	device := fmt.Sprintf("%02x:%02x:%d", unix.Major(stat.Dev), unix.Minor(stat.Dev), stat.Ino)
	// "3: FLOCK  ADVISORY  WRITE 1234 00:1a:5678 0 EOF"; one that waits has "->" first.
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) > 5 && fields[1] == "FLOCK" && fields[5] == device {
			pid, err := strconv.Atoi(fields[4])
			if err != nil {
				pid = 0
			}
			return lockHolder(max(pid, 0)), true
		}
	}
	return 0, false
}
