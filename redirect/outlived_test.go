// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/weirmesh/weir/test"
)

// The path of a namespace may go before it does: Docker restarts a pause container,
// and the tasks run on where they are.
func TestTasksStayRedirectedInANamespaceWithoutAPath(t *testing.T) {
	n := newNode(t)
	old, next := n.newAlloc(), n.newAlloc()
	path := filepath.Join(t.TempDir(), "netns")
	if err := os.Symlink(old.Path, path); err != nil {
		t.Fatal(err)
	}
	if err := n.Add(Attachment{Key: old.key, NetNS: path, Request: old.request()}); err != nil {
		t.Fatal(err)
	}
	old.startProxy()
	old.works()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := n.PruneDead(); err != nil {
		t.Fatal(err)
	}
	old.works()
	next.key = old.key
	next.add()
	next.startProxy()
	next.works()
	old.works()
	next.remove()
	old.works()

	cookie := old.Cookie()
	for _, task := range old.taskCache {
		task.Stop()
	}
	old.outbound.Stop()
	old.inbound.Stop()
	old.End()
	test.Eventually(t, func() error {
		if _, err := n.PruneDead(); err != nil {
			return err
		}
		if _, err := os.Stat(n.Paths().Lookup(cookie)); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("its lookup program: %v, want it gone", err)
		}
		return nil
	}, "the old namespace to be forgotten")
	nothingLeft(t, n.Datapath)
}
