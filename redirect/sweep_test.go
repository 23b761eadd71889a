// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

func TestKnownIsWhatWasAskedFor(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	meshConfig := workload.MeshConfig{ExcludeInboundPorts: []uint16{8081}, Guard: workload.GuardAudit}
	if err := n.SetMeshConfig(a.key, meshConfig); err != nil {
		t.Fatal(err)
	}
	list, err := n.Records()
	if err != nil || len(list) != 1 {
		t.Fatalf("known = %+v, %v; want one", list, err)
	}
	got := list[0]
	if got.Key != a.key || got.NetNS != a.Path || got.Cookie != a.Cookie() || !got.Complete {
		t.Errorf("known = %+v", got)
	}
	if !workload.Merge(got.Request, got.MeshConfig).Equal(workload.Merge(a.request(), meshConfig)) {
		t.Errorf("request and mesh configuration = %+v, %+v", got.Request, got.MeshConfig)
	}
}

func TestRepairPutsBackALinkAndSaysSo(t *testing.T) {
	n := newNode(t)
	if repairs, err := n.Repair(); err != nil || len(repairs) > 0 {
		t.Fatalf("repair of what is whole = %q, %v; want nothing", repairs, err)
	}
	if err := os.Remove(n.Paths().Link("weir_connect4")); err != nil {
		t.Fatal(err)
	}
	if repairs, err := n.Repair(); err != nil || !slices.Equal(repairs, []program.Repair{{Kind: program.Attached, Object: "weir_connect4"}}) {
		t.Errorf("repair = %q, %v; want to hear what was done, once", repairs, err)
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
	if keys, err := n.LookupsMissing(); err != nil || len(keys) > 0 {
		t.Fatalf("unhooked = %v, %v; want none", keys, err)
	}
	if err := os.Remove(n.Paths().Lookup(b.Cookie())); err != nil {
		t.Fatal(err)
	}
	keys, err := n.LookupsMissing()
	if diff := cmp.Diff([]workload.AttachmentID{b.key}, keys); err != nil || diff != "" {
		t.Errorf("unhooked, %v (-want +got):\n%s", err, diff)
	}
}

func TestPruneForgetsADeadNamespaceOfAnyNetwork(t *testing.T) {
	n := newNode(t)
	a, b := n.newAlloc(), n.newAlloc()
	a.add(func(r *workload.Request) { r.Network = "one" })
	b.add(func(r *workload.Request) { r.Network = "other" })
	if removed, err := n.PruneDead(); err != nil || len(removed) > 0 {
		t.Fatalf("prune among the living = %v, %v; want nothing", removed, err)
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
	if removed, err := n.PruneDead(); err != nil || len(removed) > 0 {
		t.Fatalf("prune while the namespace lives on without its path = %v, %v; want nothing", removed, err)
	}
	a.End()
	test.Eventually(t, func() error {
		removed, err := n.PruneDead()
		if diff := cmp.Diff([]workload.AttachmentID{a.key}, removed); err != nil || diff != "" {
			return fmt.Errorf("prune, %w (-want +got):\n%s", err, diff)
		}
		return nil
	}, "the dead namespace to be pruned")
	if list, err := n.Records(); err != nil || len(list) != 1 || list[0].Key != b.key {
		t.Errorf("known = %+v, %v; want the living one", list, err)
	}
}
