// SPDX-License-Identifier: MPL-2.0

package main

import (
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// What a command does, it does on other threads than the process's first one.
func TestCommandsLeaveTheFirstThread(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	first := unix.Gettid()
	code := onOtherThreads(func() int {
		if unix.Gettid() == first {
			t.Error("the command runs on the first thread")
		}
		var all sync.WaitGroup
		for range 100 {
			all.Go(func() {
				runtime.LockOSThread() // the thread ends with the goroutine: the next one takes another
				if unix.Gettid() == first {
					t.Error("a goroutine of the command runs on the first thread")
				}
			})
		}
		all.Wait()
		return 7
	})
	if code != 7 {
		t.Errorf("exit code %d, want the command's", code)
	}
}
