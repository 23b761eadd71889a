// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/test"
)

func TestKnownIsWhatWasAskedFor(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	overlay := Overlay{ExcludeInboundPorts: []uint16{8081}, Guard: GuardAudit}
	if err := n.SetOverlay(a.key, overlay); err != nil {
		t.Fatal(err)
	}
	list, err := n.Known()
	if err != nil || len(list) != 1 {
		t.Fatalf("known = %+v, %v; want one", list, err)
	}
	got := list[0]
	if got.Key != a.key || got.NetNS != a.Path || got.Cookie != a.Cookie() || !got.Complete {
		t.Errorf("known = %+v", got)
	}
	if !Merge(got.Request, got.Overlay).Equal(Merge(a.request(), overlay)) {
		t.Errorf("request and overlay = %+v, %+v", got.Request, got.Overlay)
	}
}

func TestMendPutsBackALinkAndSaysSo(t *testing.T) {
	n := newNode(t)
	if did, err := n.Mend(); err != nil || len(did) > 0 {
		t.Fatalf("mend of what is whole = %q, %v; want nothing", did, err)
	}
	if err := os.Remove(n.paths.link("weir_connect4")); err != nil {
		t.Fatal(err)
	}
	if did, err := n.Mend(); err != nil || !slices.Equal(did, []string{"attached weir_connect4"}) {
		t.Errorf("mend = %q, %v; want to hear what was done, once", did, err)
	}
	if status, err := n.Status(); err != nil || !status.Healthy() {
		t.Errorf("status = %+v, %v; want it healthy", status, err)
	}
}

func TestUnhookedNamesWhoseProgramIsNotPinned(t *testing.T) {
	n := newNode(t)
	a, b := n.newAlloc(), n.newAlloc()
	a.add()
	b.add()
	if keys, err := n.Unhooked(); err != nil || len(keys) > 0 {
		t.Fatalf("unhooked = %v, %v; want none", keys, err)
	}
	if err := os.Remove(n.paths.lookup(b.Cookie())); err != nil {
		t.Fatal(err)
	}
	keys, err := n.Unhooked()
	if diff := cmp.Diff([]Key{b.key}, keys); err != nil || diff != "" {
		t.Errorf("unhooked, %v (-want +got):\n%s", err, diff)
	}
}

func TestSweepForgetsADeadNamespaceOfAnyNetwork(t *testing.T) {
	n := newNode(t)
	a, b := n.newAlloc(), n.newAlloc()
	a.add(func(r *Request) { r.Network = "one" })
	b.add(func(r *Request) { r.Network = "other" })
	if removed, err := n.Sweep(); err != nil || len(removed) > 0 {
		t.Fatalf("sweep among the living = %v, %v; want nothing", removed, err)
	}
	// Another namespace under the path: nothing leads to the one on record any more.
	replacement := test.NewNetNS(t)
	path := filepath.Join(t.TempDir(), "netns")
	if err := os.Symlink(a.Path, path); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Check(a.key, path); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(replacement.Path, path); err != nil {
		t.Fatal(err)
	}
	if removed, err := n.Sweep(); err != nil || len(removed) > 0 {
		t.Fatalf("sweep while the namespace lives on without its path = %v, %v; want nothing", removed, err)
	}
	a.End()
	test.Eventually(t, func() error {
		removed, err := n.Sweep()
		if diff := cmp.Diff([]Key{a.key}, removed); err != nil || diff != "" {
			return fmt.Errorf("sweep, %w (-want +got):\n%s", err, diff)
		}
		return nil
	}, "the dead namespace to be swept")
	if list, err := n.Known(); err != nil || len(list) != 1 || list[0].Key != b.key {
		t.Errorf("known = %+v, %v; want the living one", list, err)
	}
}
