// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/test"
)

// A directory that comes, goes and comes again is watched each time.
func TestWatcherFollowsADirectoryThatComesAndGoes(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "lib", "results")
	w, err := discover.NewWatcher(dir)
	if err != nil {
		t.Fatal(err)
	}
	changes := make(chan string, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.Run(func(dir string) { changes <- dir })
	}()
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
		<-done
	})
	await := func(what, want string) {
		t.Helper()
		deadline := time.After(30 * time.Second)
		for {
			select {
			case got := <-changes:
				if got == want {
					return
				}
			case <-deadline:
				t.Fatalf("%s was not told", what)
			}
		}
	}
	ensure := func(want bool) {
		t.Helper()
		if fresh, err := w.Ensure(); err != nil || fresh != want {
			t.Fatalf("ensure = %v, %v; want %v", fresh, err, want)
		}
	}

	ensure(true) // the root, in place of what is not there
	ensure(false)
	for range 2 {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		await("the directory above", root)
		ensure(true)
		test.WriteFile(t, filepath.Join(dir, "file"), "x")
		await("a file in it", dir)
		if err := os.RemoveAll(filepath.Join(root, "lib")); err != nil {
			t.Fatal(err)
		}
		await("its end", dir)
		ensure(true)
	}
}
