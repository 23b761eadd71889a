// SPDX-License-Identifier: MPL-2.0

package ended

import (
	"os"
	"runtime"
	"testing"

	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// Threads are looked at where no process is in a namespace by its first one: a full node
// has many, and "weir status" waits for this.
func TestThreadsAreLookedAtWhereTheyMatter(t *testing.T) {
	test.Need(t, test.Root)
	alloc := test.NewBareNetNS(t)
	inode, found, err := inodeOf(alloc.Path)
	if err != nil || !found {
		t.Fatalf("%s: namespace %t, %v", alloc.Path, found, err)
	}
	own, _, err := inodeOf("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}

	u, err := findNamespaceUsers()
	if err != nil {
		t.Fatal(err)
	}
	if used, err := u.in(own); !used || err != nil || u.threads != nil {
		t.Fatalf("this process is in its own namespace: %t, %v; %d namespaces by thread, none is wanted", used, err, len(u.threads))
	}
	if used, err := u.in(inode); used || err != nil {
		t.Fatalf("nothing is in %s yet: %t, %v", alloc.Path, used, err)
	}

	notTheFirst(func() {
		alloc.Do(func() {
			u, err := findNamespaceUsers()
			if err != nil {
				t.Error(err)
				return
			}
			if used, err := u.in(inode); !used || err != nil {
				t.Errorf("thread %d of process %d is in %s: %t, %v", unix.Gettid(), os.Getpid(), alloc.Path, used, err)
			}
		})
	})
}

// notTheFirst runs a function on a thread that is not the process's first.
func notTheFirst(run func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if unix.Gettid() == os.Getpid() {
			notTheFirst(run) // this one keeps the first
			return
		}
		run()
	}()
	<-done
}
