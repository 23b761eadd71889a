// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// hidePins mounts another bpffs over the one that the pins are in.
func (n *node) hidePins() {
	n.t.Helper()
	dir := filepath.Dir(n.Paths().PinDir)
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0700"); err != nil {
		n.t.Fatalf("mount bpffs over the pins: %v", err)
	}
	n.t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			n.t.Errorf("unmount bpffs: %v", err)
		}
	})
}

func did(repairs []program.Repair, want program.Repair) bool { return slices.Contains(repairs, want) }

// Pins that cannot be seen are no sign that nothing runs. Whoever comes first
// takes over what does, with all rows, and not a connection is refused.
func TestHiddenPinsAreTakenOver(t *testing.T) {
	hide := func(n *node) { n.hidePins() }
	lose := func(path ...string) func(*node) {
		return func(n *node) {
			if err := os.RemoveAll(filepath.Join(append([]string{n.Paths().PinDir}, path...)...)); err != nil {
				n.t.Fatal(err)
			}
		}
	}
	check := func(n *node, a *alloc) ([]program.Repair, error) { return n.Check(a.key, a.Path) }
	load := func(n *node, _ *alloc) ([]program.Repair, error) { result, err := n.Load(); return result.Did, err }
	repair := func(n *node, _ *alloc) ([]program.Repair, error) { return n.Repair() }
	add := func(n *node, _ *alloc) ([]program.Repair, error) { n.newAlloc().add(full); return nil, nil }
	for _, tc := range []struct {
		name   string
		damage func(*node)
		repair func(*node, *alloc) ([]program.Repair, error)
		older  func(store.Paths) uint32 // whose programs of an older version say that they are; nil: of this one
	}{
		{"by CHECK", hide, check, nil},
		{"by load", hide, load, nil},
		{"by the agent", hide, repair, nil},
		{"by ADD of another", hide, add, nil},
		{"of the oldest version", hide, load, func(store.Paths) uint32 { return 0 }},
		{"of an older version", hide, load, program.FormerInstanceOf},
		{"control's pin removed", lose("maps", "control"), repair, nil},
		{"maps' pins removed", lose("maps"), repair, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add(full)
			a.startProxy()
			a.works()
			if tc.older != nil {
				editControl(t, n.Datapath, func(row *bpfmap.BpfControl) { row.Instance = tc.older(n.Paths()) })
			}
			before, rows := kernelObjects(t, n.Datapath), rowCounts(t, n.Datapath)
			load := newTraffic(t)
			load.dial(test.Spec{NetNS: a.NetNS, Cgroup: a.taskCg, UID: taskUID, GID: taskUID}, addrPort(remote4(1), 4321), a.outbound)
			load.dial(test.Spec{NetNS: n.remote}, addrPort(a.v4, 4321), a.inbound)
			tc.damage(n)
			status, err := n.Status()
			if err != nil || status.Healthy() {
				t.Errorf("status: healthy %t, %v; want it to tell", status.Healthy(), err)
			}
			for _, problem := range status.Problems {
				if strings.Contains(problem.What, "no workload is redirected") || !strings.Contains(problem.What, "redirect 1 workloads") {
					t.Errorf("status says %q while the workload is redirected", problem.What)
				}
			}
			repairs, err := tc.repair(n, a)
			if err != nil {
				t.Fatal(err)
			}
			if repairs != nil && !did(repairs, program.Repair{Kind: program.PinPutBack, Object: "map origins"}) && !did(repairs, program.Repair{Kind: program.PinPutBack, Object: "map control"}) {
				t.Errorf("done: %q, want the pins put back", repairs)
			}
			load.sawBoth(map[string]int{addrPort(remote4(1), 4321): 1, addrPort(a.v4, 4321): 1})
			now := kernelObjects(t, n.Datapath)
			if diff := cmp.Diff(before.maps, now.maps); diff != "" {
				t.Errorf("other tables are pinned (-before +after):\n%s", diff)
			}
			if len(repairs) > 0 {
				if diff := cmp.Diff(rows, rowCounts(t, n.Datapath)); diff != "" {
					t.Errorf("rows (-before +after):\n%s", diff)
				}
				if diff := cmp.Diff(before.counts(), now.counts()); diff != "" {
					t.Errorf("maps, programs, links (-before +after):\n%s", diff)
				}
			}
			a.works()
			healthy(t, n.Datapath)
			if repairs, err := n.Repair(); err != nil || len(repairs) > 0 {
				t.Errorf("repair again: %q, %v; want nothing done", repairs, err)
			}
		})
	}
}

// What has no record any more is found by what its program says.
func TestHiddenLookupWithoutARecordIsTakenOver(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	if err := n.Paths().RemoveRecord(a.key); err != nil {
		t.Fatal(err)
	}
	n.hidePins()
	if _, err := n.Load(); err != nil {
		t.Fatal(err)
	}
	if !n.LookupAttached(a.Cookie()) {
		t.Error("the lookup program has no pin")
	}
	a.works()
	a.add()
	a.works()
	healthy(t, n.Datapath)
}

func TestHiddenPinsAtDEL(t *testing.T) {
	n := newNode(t)
	a, b := n.newAlloc(), n.newAlloc()
	a.add(full)
	b.add(full)
	n.hidePins()
	a.remove()
	b.remove()
	nothingLeft(t, n.Datapath)
	healthy(t, n.Datapath)
}

func TestUnloadFindsHiddenPrograms(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	a.works()
	n.hidePins()
	removed, err := n.Unload()
	if err != nil || !strings.Contains(fmt.Sprint(removed), "weir_connect4") || !strings.Contains(fmt.Sprint(removed), "weir_lookup") {
		t.Fatalf("removed %q, %v; want what is attached detached", removed, err)
	}
	remote := test.Echo(t, n.remote, "tcp4", "10.9.1.1:80")
	if answer, err := a.ask("tcp4", "10.9.1.1:80"); err != nil || answer.Server != remote.Name {
		t.Errorf("dial after unload: %+v, %v", answer, err)
	}
}

// Two sets of one instance refuse every connection, which is how an earlier
// version left a node. One of them goes.
func TestTwoSetsOfOneInstance(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(full)
	a.startProxy()
	a.works()
	if err := n.Paths().RemoveRecord(a.key); err != nil {
		t.Fatal(err)
	}
	n.hidePins()
	root, err := n.Paths().OpenCgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if _, err := n.LoadFresh(root); err != nil {
		t.Fatal(err)
	}
	status, err := n.Status()
	if err != nil || !anyProblem(status.Problems, "programs of this instance are attached that no pin leads to") {
		t.Errorf("status: %v, %v; want the other set named", status.Problems, err)
	}
	result, err := n.Load()
	if err != nil || !slices.ContainsFunc(result.Did, func(r program.Repair) bool { return r.Kind == program.StrayDetached }) {
		t.Fatalf("load: %+v, %v; want the hidden set detached", result, err)
	}
	a.add(full)
	a.works()
	healthy(t, n.Datapath)
}

func anyProblem(problems []health.Problem, part string) bool {
	for _, problem := range problems {
		if strings.Contains(problem.What, part) {
			return true
		}
	}
	return false
}

// Two instances on one namespace would refuse all of it: the second is refused.
func TestSecondInstanceOnANamespaceIsRefused(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(full)
	a.startProxy()
	other := newDatapath(t)
	err := other.Add(Attachment{Key: a.key, NetNS: a.Path, Request: a.request()})
	if !errors.Is(err, program.ErrOtherInstance) {
		t.Fatalf("add: %v, want ErrOtherInstance", err)
	}
	if diff := cmp.Diff(map[string]int{}, rowCounts(t, other)); diff != "" {
		t.Errorf("rows of the second instance (-want +got):\n%s", diff)
	}
	nothingLeft(t, other)
	a.works()
	healthy(t, n.Datapath)
	a.remove()
	if err := other.Add(Attachment{Key: a.key, NetNS: a.Path, Request: a.request()}); err != nil {
		t.Errorf("add once the first has let go: %v", err)
	}
}

// Programs of others on the hooks are named, with which of them comes first.
func TestStatusNamesProgramsOfOthers(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	first := attachNeighbour(t)
	n := newNode(t)
	second := attachNeighbour(t)
	pin := filepath.Join(filepath.Dir(n.Paths().PinDir), "neighbour")
	if err := second.link.Pin(pin); err != nil {
		t.Fatal(err)
	}
	another := newDatapath(t)
	status, err := n.Status()
	if err != nil {
		t.Fatal(err)
	}
	if !status.Healthy() {
		t.Errorf("problems: %v", status.Problems)
	}
	n.NameOthers(status.Others)
	find := func(id uint32) (found inspect.Other) {
		for _, other := range status.Others {
			if other.ID == id {
				found = other
			}
		}
		return found
	}
	neighbourID := func(nb *neighbour) uint32 {
		info, err := nb.link.Info()
		if err != nil {
			t.Fatal(err)
		}
		return uint32(info.Program)
	}
	effect := "may refuse a connection or datagram, or send it elsewhere"
	want := inspect.Other{ID: neighbourID(first), Name: "neighbour", Hook: "CGroupInet4Connect", Order: "before", Effect: effect}
	if diff := cmp.Diff(want, find(want.ID)); diff != "" {
		t.Errorf("the first (-want +got):\n%s", diff)
	}
	want = inspect.Other{ID: neighbourID(second), Name: "neighbour", Hook: "CGroupInet4Connect", Order: "after", Effect: effect, Pinned: pin}
	if diff := cmp.Diff(want, find(want.ID)); diff != "" {
		t.Errorf("the second (-want +got):\n%s", diff)
	}
	ids := linkIDs(t, another.Paths().Link("weir_sockops"))
	if other := find(ids[1]); !other.Weir || other.Order != "after" || other.Pinned != another.Paths().Link("weir_sockops") {
		t.Errorf("another instance: %+v", other)
	}
}

// A namespace whose path is gone lives on with the tasks in it. That its pins are
// hidden does not make it a dead one.
func TestPruneKeepsWhatRunsUnderHiddenPins(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	path := filepath.Join(t.TempDir(), "netns")
	if err := os.Symlink(a.Path, path); err != nil {
		t.Fatal(err)
	}
	if err := n.Add(Attachment{Key: a.key, NetNS: path, Request: a.request()}); err != nil {
		t.Fatal(err)
	}
	a.startProxy()
	a.works()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	n.hidePins()
	if removed, err := n.PruneDead(); err != nil || len(removed) != 0 {
		t.Errorf("prune removed %v, %v; want nothing", removed, err)
	}
	a.works()
}

// A node in a mount namespace of its own has the same directories by name. What another
// has attached to the root of all cgroups is not taken for its own.
func TestNodesWithTheSamePathsAreTwo(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(full)
	a.startProxy()
	a.works()
	before, rows := kernelObjects(t, n.Datapath), rowCounts(t, n.Datapath)
	mount := func(what, dir string) (end func()) {
		t.Helper()
		if err := unix.Mount(what, dir, what, 0, "mode=0700"); err != nil {
			t.Fatalf("mount %s: %v", what, err)
		}
		var once sync.Once
		end = func() {
			once.Do(func() {
				if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
					t.Errorf("unmount %s: %v", what, err)
				}
			})
		}
		t.Cleanup(end)
		return end
	}
	pins, state := mount("bpf", filepath.Dir(n.Paths().PinDir)), mount("tmpfs", filepath.Dir(n.Paths().StateDir))
	second := New(n.Paths())
	if _, err := second.Load(); err != nil {
		t.Fatal(err)
	}
	status, err := second.Status()
	if err != nil || !status.Healthy() || status.Workloads != 0 {
		t.Errorf("status of the second node: %+v, %v; want it healthy and empty", status, err)
	}
	if !slices.ContainsFunc(status.Others, func(o inspect.Other) bool { return o.Weir }) {
		t.Error("the second node does not see the first one's programs")
	}
	a.works()
	if _, err := second.Unload(); err != nil {
		t.Fatal(err)
	}
	a.works()
	state()
	pins()
	if diff := cmp.Diff(before.counts(), kernelObjects(t, n.Datapath).counts()); diff != "" {
		t.Errorf("maps, programs, links of the first node (-before +after):\n%s", diff)
	}
	if diff := cmp.Diff(rows, rowCounts(t, n.Datapath)); diff != "" {
		t.Errorf("rows of the first node (-before +after):\n%s", diff)
	}
	healthy(t, n.Datapath)
}

// A load that died when it had put maps and links back, but not all that workloads
// need, is finished by the next one.
func TestLoadFinishesWhatAKilledOneLeft(t *testing.T) {
	for name, lost := range map[string]func(*Datapath) string{
		"filters' pins": func(d *Datapath) string { return d.Paths().Filters() },
		"lookups' pins": func(d *Datapath) string { return d.Paths().Lookups() },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add(full)
			a.startProxy()
			a.works()
			want := kernelObjects(t, n.Datapath).counts()
			if err := os.RemoveAll(lost(n.Datapath)); err != nil {
				t.Fatal(err)
			}
			result, err := n.Load()
			if err != nil || len(result.Did) == 0 {
				t.Errorf("load did %q, %v; want it put back", result.Did, err)
			}
			healthy(t, n.Datapath)
			a.works()
			held := kernelObjects(t, n.Datapath)
			held.settle(t, want)
			if result, err := n.Load(); err != nil || len(result.Did) > 0 {
				t.Errorf("load again did %q, %v; want nothing", result.Did, err)
			}
		})
	}
}
