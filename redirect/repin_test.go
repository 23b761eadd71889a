// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/program"
)

func TestMapNamesAreThoseOfTheObject(t *testing.T) {
	spec, err := bpfmap.LoadBpf()
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for name := range spec.Maps {
		want = append(want, name)
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, bpfmap.MapNames()); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
}

// A pin that somebody removed comes back with the table and its rows: a fresh
// table would give indexes a second time that open connections carry.
func TestRepairPutsBackPinsOfMaps(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	a.works()
	before := kernelObjects(t, n.Datapath)
	rows := rowCounts(t, n.Datapath)
	for _, name := range bpfmap.MapNames() {
		if name == "control" { // without it the node is not loaded
			continue
		}
		if err := os.Remove(filepath.Join(n.Paths().Maps(), name)); err != nil {
			t.Fatal(err)
		}
	}
	repairs, err := n.Repair()
	if err != nil || !did(repairs, program.Repair{Kind: program.PinPutBack, Object: "map origins"}) {
		t.Fatalf("repair = %q, %v; want the pins put back", repairs, err)
	}
	if diff := cmp.Diff(before.maps, kernelObjects(t, n.Datapath).maps); diff != "" {
		t.Errorf("other tables are pinned (-before +after):\n%s", diff)
	}
	if diff := cmp.Diff(rows, rowCounts(t, n.Datapath)); diff != "" {
		t.Errorf("rows (-before +after):\n%s", diff)
	}
	if repairs, err := n.Repair(); err != nil || len(repairs) > 0 {
		t.Errorf("repair again = %q, %v; want nothing done", repairs, err)
	}
	a.works()
}
