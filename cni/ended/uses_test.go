// SPDX-License-Identifier: MPL-2.0

package ended

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/vishvananda/netns"
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

	inside := func() (used bool) { // also of a goroutine that may not end the test
		t.Helper()
		u, err := findNamespaceUsers()
		if err == nil {
			used, err = u.in(inode)
		}
		if err != nil {
			t.Error(err)
		}
		return used
	}
	notTheFirst(func() {
		alloc.Do(func() {
			if inside() {
				t.Error("a thread of this program that looks at a namespace is taken for a task's")
			}
		})
	})
	startThreadInside(t, alloc)
	if !inside() {
		t.Error("a thread of another program is in the namespace, and is not seen")
	}
}

const threadInsideFunc = "ended.threadInside"

// startThreadInside starts another program: a copy of this one, of which a thread that is
// not its first is in a namespace until the test ends.
func startThreadInside(t *testing.T, ns *test.NetNS) {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(program, self, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-test.run=^$", "--", ns.Path)
	cmd.Env = append(os.Environ(), "WEIR_TEST_HELPER="+threadInsideFunc)
	cmd.Stderr = os.Stderr
	input, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		input.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("end the program with a thread inside: %v", err)
		}
	})
	if _, err := output.Read(make([]byte, 1)); err != nil {
		t.Fatalf("wait for a thread inside: %v", err)
	}
}

// stayInsideByThread writes a byte when it is in the namespace, and ends with its input.
func stayInsideByThread(args []string) (err error) {
	notTheFirst(func() {
		var ns netns.NsHandle
		if ns, err = netns.GetFromPath(args[0]); err != nil {
			return
		}
		if err = netns.Set(ns); err != nil {
			return
		}
		if _, err = os.Stdout.Write([]byte{1}); err == nil {
			_, err = io.Copy(io.Discard, os.Stdin)
		}
		runtime.LockOSThread() // once more: the thread ends with its function
	})
	return err
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
