// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/reconcile"
	"github.com/weirmesh/weir/redirect/workload"
)

// What a node's maps and programs may take before the first workload, and with each.
const (
	nodeMemory     = 12 << 20
	workloadMemory = 6 << 10
)

// mapMemory is what the kernel accounts for the node's maps.
func mapMemory(t *testing.T, d *Datapath) (total uint64) {
	t.Helper()
	tables, err := bpfmap.OpenTablesToRead(d.Paths().Maps())
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	infos, err := tables.Infos()
	if err != nil {
		t.Fatal(err)
	}
	for _, info := range infos {
		total += info.Bytes
	}
	return total
}

// programMemory is that of the program behind a pinned link.
func programMemory(t *testing.T, pin string) uint64 {
	t.Helper()
	return memoryOf(t, programOf(t, pin))
}

// memoryOf is that of a program.
func memoryOf(t *testing.T, prog *ebpf.Program) uint64 {
	t.Helper()
	info, err := prog.Info()
	if err != nil {
		t.Fatal(err)
	}
	bytes, known := info.Memlock()
	if !known {
		t.Fatal("the kernel does not say what a program takes")
	}
	return bytes
}

// countsUse reports whether this kernel tells what a table takes, and not what it might
// take with all its rows (before Linux 6.4).
func countsUse(t *testing.T) bool {
	t.Helper()
	table, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 8, ValueSize: 1024, MaxEntries: 1024, Flags: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	info, err := table.Info()
	if err != nil {
		t.Fatal(err)
	}
	bytes, _ := info.Memlock()
	return bytes < 1024*1024
}

// callsMemory is that of the lookup program of the node, and of what leads to it.
func callsMemory(t *testing.T, d *Datapath) (total uint64) {
	t.Helper()
	for _, name := range program.CallNames() {
		table, err := ebpf.LoadPinnedMap(filepath.Join(d.Paths().Calls(), name), nil)
		if err != nil {
			t.Fatal(err)
		}
		info, err := table.Info()
		if err != nil {
			t.Fatal(err)
		}
		bytes, _ := info.Memlock()
		total += bytes
		table.Close()
	}
	prog := deciderOf(t, d)
	defer prog.Close()
	return total + memoryOf(t, prog)
}

// deciderOf is the program that those of the namespaces call.
func deciderOf(t *testing.T, d *Datapath) *ebpf.Program {
	t.Helper()
	table, err := ebpf.LoadPinnedMap(filepath.Join(d.Paths().Calls(), "lookup_calls"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	var prog *ebpf.Program
	if err := table.Lookup(uint32(0), &prog); err != nil {
		t.Fatal(err)
	}
	return prog
}

func TestMemory(t *testing.T) {
	d := newDatapath(t)
	if !countsUse(t) {
		t.Log("this kernel tells the most that a table may take, not what it does")
		return
	}
	node := mapMemory(t, d)
	links, err := os.ReadDir(d.Paths().Links())
	if err != nil || len(links) == 0 {
		t.Fatalf("links: %v, %v", links, err)
	}
	for _, entry := range links {
		node += programMemory(t, d.Paths().Link(entry.Name()))
	}
	node += callsMemory(t, d)
	t.Logf("%d KiB before the first workload", node>>10)
	if node > nodeMemory {
		t.Errorf("maps and programs take %d KiB before the first workload, want at most %d", node>>10, nodeMemory>>10)
	}

	const count = 32
	before := mapMemory(t, d)
	list := plainWorkloads(t, d, count)
	var changes []reconcile.MeshChange
	for _, a := range list {
		changes = append(changes, reconcile.MeshChange{Key: a.Key, MeshConfig: meshConfigs()[0]})
	}
	if err := errors.Join(d.SetMeshConfigs(changes)...); err != nil {
		t.Fatal(err)
	}
	grown := mapMemory(t, d) - before
	lookups, err := os.ReadDir(d.Paths().Lookups())
	if err != nil || len(lookups) != count {
		t.Fatalf("lookup programs: %v, %v", lookups, err)
	}
	for _, entry := range lookups {
		grown += programMemory(t, d.Paths().Lookups()+"/"+entry.Name())
	}
	t.Logf("%d bytes a workload", grown/count)
	if each := grown / count; each > workloadMemory || each == 0 {
		t.Errorf("a workload takes %d bytes in maps and programs, want at most %d, and some", each, workloadMemory)
	}
}

// The operator says for how many workloads and destinations the tables are made, the
// programs know where the room for them ends, and tables that are there stay.
func TestSizes(t *testing.T) {
	sizes := bpfmap.Sizes{Workloads: 1024, Origins: bpfmap.MinOrigins}
	d := unloadedDatapath(t).Sized(sizes)
	if _, err := d.Load(); err != nil {
		t.Fatal(err)
	}
	rows := func() map[string]uint32 {
		status, err := d.Status()
		if err != nil {
			t.Fatal(err)
		}
		found := make(map[string]uint32)
		for _, table := range status.Maps {
			found[table.Name] = table.MaxEntries
		}
		return found
	}
	made := rows()
	for name, want := range map[string]uint32{"workloads": 1024, "configs": 2048, "origins": bpfmap.MinOrigins, "indexes": bpfmap.MinOrigins, "events": 1 << 20} {
		if made[name] != want {
			t.Errorf("table %s has room for %d rows, want %d", name, made[name], want)
		}
	}
	d = d.Sized(bpfmap.Sizes{})
	if result, err := d.Load(); err != nil || result.Changed || rows()["origins"] != bpfmap.MinOrigins {
		t.Errorf("loaded again with other sizes: %+v, %v; origins has %d rows", result, err, rows()["origins"])
	}
	healthy(t, d)
	list := plainWorkloads(t, d, 1)
	if err := d.SetMeshConfig(list[0].Key, workload.MeshConfig{InboundPort: 20001}); err != nil {
		t.Fatal(err)
	}
}
