// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// pinnedLinks maps the name of each link at the root to its ID and its program's.
func pinnedLinks(t *testing.T, d *Datapath) map[string][2]uint32 {
	t.Helper()
	ids := make(map[string][2]uint32)
	for _, name := range program.ProgramNames() {
		ids[name] = linkIDs(t, d.Paths().Link(name))
	}
	return ids
}

// linkIDs are the IDs of a pinned link and of its program.
func linkIDs(t *testing.T, pin string) [2]uint32 {
	t.Helper()
	pinned, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		t.Fatalf("open link: %v", err)
	}
	defer pinned.Close()
	info, err := pinned.Info()
	if err != nil {
		t.Fatal(err)
	}
	return [2]uint32{uint32(info.ID), uint32(info.Program)}
}

func detachPinned(t *testing.T, pin string) {
	t.Helper()
	pinned, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pinned.Close()
	if err := pinned.Detach(); err != nil {
		t.Fatalf("detach %s: %v", pin, err)
	}
}

func healthy(t *testing.T, d *Datapath) {
	t.Helper()
	status, err := d.Status()
	if err != nil {
		t.Fatal(err)
	}
	if !status.Healthy() || !status.Current {
		t.Errorf("status: loaded %t, current %t, problems %v", status.Loaded, status.Current, status.Problems)
	}
}

func TestLoadTwiceChangesNothing(t *testing.T) {
	d := unloadedDatapath(t)
	first, err := d.Load()
	if err != nil {
		t.Fatal(err)
	}
	if !first.Changed || len(first.Did) < len(program.ProgramNames()) {
		t.Errorf("first load: %+v, want it to say what it did", first)
	}
	healthy(t, d)
	links, pins := pinnedLinks(t, d), files(t, d)
	second, err := d.Load()
	if err != nil {
		t.Fatal(err)
	}
	if second.Changed || len(second.Did) != 0 {
		t.Errorf("second load: %+v, want nothing done", second)
	}
	if diff := cmp.Diff(links, pinnedLinks(t, d)); diff != "" {
		t.Errorf("links after a second load (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(pins, files(t, d)); diff != "" {
		t.Errorf("pins after a second load (-want +got):\n%s", diff)
	}
}

func TestProgramNamesAreThoseOfTheObject(t *testing.T) {
	spec, err := bpfmap.LoadBpf()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for name := range spec.Programs {
		names = append(names, name)
	}
	slices.Sort(names)
	if diff := cmp.Diff(names, program.ProgramNames()); diff != "" {
		t.Errorf("programs of the object and of programNames (-object +names):\n%s", diff)
	}
	for _, h := range program.Hooks() {
		if prog := spec.Programs[h.Program]; prog != nil && prog.AttachType != h.Attach {
			t.Errorf("hook of %s is %s, want %s", h.Program, h.Attach, prog.AttachType)
		}
	}
}

func TestLoadRepairsLinks(t *testing.T) {
	for _, tc := range []struct {
		name   string
		damage func(t *testing.T, d *Datapath)
	}{
		{"pin removed", func(t *testing.T, d *Datapath) {
			if err := os.Remove(d.Paths().Link("weir_connect4")); err != nil {
				t.Fatal(err)
			}
		}},
		{"link detached", func(t *testing.T, d *Datapath) { detachPinned(t, d.Paths().Link("weir_connect4")) }},
		{"links of a dead cgroup", func(t *testing.T, d *Datapath) {
			var cgroup *test.Cgroup
			t.Run("cgroup", func(inner *testing.T) {
				cgroup = test.NewCgroup(inner)
				if err := os.RemoveAll(d.Paths().Links()); err != nil {
					t.Fatal(err)
				}
				paths := d.Paths()
				paths.CgroupRoot = cgroup.Path
				if _, err := New(paths).Load(); err != nil {
					t.Fatal(err)
				}
			})
			if _, err := os.Stat(cgroup.Path); err == nil {
				t.Fatalf("cgroup %s lives", cgroup.Path)
			}
		}},
		{"links of a living cgroup", func(t *testing.T, d *Datapath) {
			if err := os.RemoveAll(d.Paths().Links()); err != nil {
				t.Fatal(err)
			}
			paths := d.Paths()
			paths.CgroupRoot = test.NewCgroup(t).Path
			if _, err := New(paths).Load(); err != nil {
				t.Fatal(err)
			}
		}},
		{"all links removed", func(t *testing.T, d *Datapath) {
			if err := os.RemoveAll(d.Paths().Links()); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add()
			a.startProxy()
			tc.damage(t, n.Datapath)
			status, err := n.Status()
			if err != nil {
				t.Fatal(err)
			}
			if status.Healthy() {
				t.Error("status passes over the damage")
			}
			result, err := n.Load()
			if err != nil {
				t.Fatal(err)
			}
			if !result.Changed || !strings.Contains(fmt.Sprint(result.Did), "weir_connect4") {
				t.Errorf("load says %q", result.Did)
			}
			healthy(t, n.Datapath)
			a.works()
		})
	}
}

func TestLoadRefusesAnotherLayout(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	tables, err := bpfmap.OpenTables(n.Paths().Maps())
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	setLayout := func(number uint32) {
		t.Helper()
		var row bpfmap.BpfControl
		if _, err := tables.Get("control", uint32(0), &row); err != nil {
			t.Fatal(err)
		}
		row.Layout = number
		if err := tables.Put("control", uint32(0), row, ebpf.UpdateAny); err != nil {
			t.Fatal(err)
		}
	}
	setLayout(bpfmap.Layout + 1)
	pins, links, rows := files(t, n.Datapath), pinnedLinks(t, n.Datapath), rowCounts(t, n.Datapath)
	for name, action := range map[string]func() error{
		"add": func() error {
			return n.Add(Attachment{Key: workload.AttachmentID{ContainerID: "other", IfName: "eth0"}, NetNS: test.NewNetNS(t).Path})
		},
		"check": func() error { _, err := n.Check(a.key, a.Path); return err },
		"probe": n.Probe,
		"overlay": func() error {
			return n.SetMeshConfig(a.key, workload.MeshConfig{InboundPort: 21000})
		},
	} {
		if err := action(); !errors.Is(err, bpfmap.ErrIncompatible) || !strings.Contains(err.Error(), "weir load") {
			t.Errorf("%s on another layout: %v, want ErrIncompatible with a remedy", name, err)
		}
	}
	if diff := cmp.Diff(pins, files(t, n.Datapath)); diff != "" {
		t.Errorf("pins and records changed (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(links, pinnedLinks(t, n.Datapath)); diff != "" {
		t.Errorf("links changed (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(rows, rowCounts(t, n.Datapath)); diff != "" {
		t.Errorf("rows changed (-want +got):\n%s", diff)
	}
	// The act of an operator or of the agent takes running workloads along.
	result, err := n.Load()
	if err != nil || !did(result.Did, program.Repair{Kind: program.WorkloadMigrated, Object: a.key.String()}) {
		t.Errorf("load did %q, %v; want the workload migrated", result.Did, err)
	}
	healthy(t, n.Datapath)
	a.works()
}

// What an index stands for is read by one program a moment after another wrote it:
// there is no way to another shape of that map while connections run.
func TestLoadRefusesAnotherShapeOfIndexes(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	pin, aside := filepath.Join(n.Paths().Maps(), "indexes"), filepath.Join(filepath.Dir(n.Paths().PinDir), "indexes")
	if err := os.Rename(pin, aside); err != nil {
		t.Fatal(err)
	}
	other, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 16, ValueSize: 32, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := other.Pin(pin); err != nil {
		t.Fatal(err)
	}
	editControl(t, n.Datapath, func(row *bpfmap.BpfControl) { row.Layout = bpfmap.Layout + 1 })
	links, rows := pinnedLinks(t, n.Datapath), rowCounts(t, n.Datapath)
	if _, err := n.Load(); !errors.Is(err, bpfmap.ErrIncompatible) || !strings.Contains(err.Error(), "drain the node, 'weir unload', then load this version") {
		t.Errorf("load: %v, want ErrIncompatible and the procedure", err)
	}
	if diff := cmp.Diff(links, pinnedLinks(t, n.Datapath)); diff != "" {
		t.Errorf("links changed (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(rows, rowCounts(t, n.Datapath)); diff != "" {
		t.Errorf("rows changed (-want +got):\n%s", diff)
	}
	a.works()
	if err := os.Rename(aside, pin); err != nil {
		t.Fatal(err)
	}
}

func TestLoadRefusesMapsOfAnotherShape(t *testing.T) {
	d := newDatapath(t)
	pin := filepath.Join(d.Paths().Maps(), "verdicts")
	if err := os.Remove(pin); err != nil {
		t.Fatal(err)
	}
	other, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 8, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := other.Pin(pin); err != nil {
		t.Fatal(err)
	}
	detachPinned(t, d.Paths().Link("weir_connect6"))
	if _, err := d.Load(); !errors.Is(err, bpfmap.ErrIncompatible) || !strings.Contains(err.Error(), "verdicts") {
		t.Errorf("load over a map of another shape: %v, want ErrIncompatible that names it", err)
	}
}

func TestLoadSaysWhatTheHostLacks(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	bpffs, state := test.BPFFS(t), t.TempDir()
	for _, tc := range []struct {
		name  string
		paths store.Paths
		want  string
	}{
		{"no bpffs", store.Paths{PinDir: filepath.Join(t.TempDir(), "weir")}, "not in a bpffs, mount one there"},
		{"cgroup root is no cgroup", store.Paths{PinDir: filepath.Join(bpffs, "a"), CgroupRoot: t.TempDir()}, "not a cgroup v2 directory"},
		{"cgroup root does not exist", store.Paths{PinDir: filepath.Join(bpffs, "a"), CgroupRoot: "/no/such/cgroup"}, "no such file or directory"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.paths.StateDir = state
			d := New(tc.paths)
			_, err := d.Load()
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("load: %v, want %q", err, tc.want)
			}
			if left := files(t, d); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

func TestTwoInstancesDoNotDisturbEachOther(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	other := newDatapath(t)
	b := n.newAlloc()
	second := *n
	second.Datapath = other
	b.node = &second
	b.add()
	b.startProxy()
	a.works()
	b.works()
	before := a.counts()
	b.works()
	if diff := cmp.Diff(before, a.counts()); diff != "" {
		t.Errorf("a connection of one instance moved counters of the other (-want +got):\n%s", diff)
	}
	if _, err := other.Unload(); err != nil {
		t.Fatal(err)
	}
	a.works()
	healthy(t, n.Datapath)
}
