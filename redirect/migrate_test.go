// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/host/sysctl"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/program/filter"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// loadLayout2 loads the programs and maps of the version with layout 2, whose
// objects are test data, as that version did.
func (n *node) loadLayout2() {
	n.t.Helper()
	defer n.objectsOfLayout2()()
	n.loadFormer(2, func(string, *ebpf.MapSpec) {})
}

// loadFormer loads programs and maps as another version did, with the maps
// edited.
func (n *node) loadFormer(number uint32, edit func(name string, spec *ebpf.MapSpec)) {
	n.t.Helper()
	fail := func(err error) {
		n.t.Helper()
		if err != nil {
			n.t.Fatalf("load layout %d: %v", number, err)
		}
	}
	spec, err := bpfmap.LoadBpf()
	fail(err)
	for name, mapSpec := range spec.Maps {
		edit(name, mapSpec)
	}
	fail(n.Paths().EnsureBPFFS())
	root, err := n.Paths().OpenCgroupRoot()
	fail(err)
	defer root.Close()
	pins, err := bpfmap.CreateMaps(spec, n.Paths().Maps(), 0)
	defer bpfmap.CloseMaps(pins)
	fail(err)
	fail(pins["control"].Put(uint32(0), &bpfmap.BpfControl{Layout: number}))
	collection, err := program.NewCollection(spec, pins)
	fail(err)
	defer collection.Close()
	_, err = program.AttachAll(collection.Programs, spec.Programs, root, n.Paths().Links())
	fail(err)
	if number != bpfmap.Layout {
		return // it had no filters
	}
	filters, err := bpfmap.LoadFilter()
	fail(err)
	for name, mapSpec := range filters.Maps {
		edit(name, mapSpec)
	}
	programs, err := filter.PinFilterPrograms(filters, n.Paths().Maps(), n.Paths().Filters())
	fail(err)
	programs.Close()
}

// objectsOfLayout2 takes the place of this version's until the result is called.
func (n *node) objectsOfLayout2() (restore func()) {
	n.t.Helper()
	bpf, err := os.ReadFile("testdata/layout2/bpf.o")
	if err != nil {
		n.t.Fatal(err)
	}
	lookup, err := os.ReadFile("testdata/layout2/lookup.o")
	if err != nil {
		n.t.Fatal(err)
	}
	return bpfmap.SwapObjects(bpf, lookup)
}

// addToLayout2 is add on a node of layout 2.
func (a *alloc) addToLayout2() {
	a.node.t.Helper()
	fail := func(err error) {
		a.node.t.Helper()
		if err != nil {
			a.node.t.Fatalf("add to layout 2: %v", err)
		}
	}
	defer a.node.objectsOfLayout2()()
	ns, err := host.OpenNamespace(a.Path)
	fail(err)
	defer ns.Close()
	boot, err := store.BootID()
	fail(err)
	r := &store.Record{Key: a.key, Request: a.request(), NetNS: a.Path, Cookie: ns.Cookie, BootID: boot}
	_, err = inspect.ObserveSources(r, ns)
	fail(err)
	r.Ephemeral, err = ns.Ephemeral(sysctl.Shared())
	fail(err)
	r.IPv6, err = ns.SetRoutes(r.Desired())
	fail(err)
	r.Sources = workload.Sources{} // unknown to that version
	tables := &bpfmap.Tables{Dir: a.node.Paths().Maps(), Open: make(map[string]*ebpf.Map)}
	defer tables.Close()
	fail(tables.Put("verdicts", ns.Cookie, make([]byte, 27*8), ebpf.UpdateNoExist))
	fail(tables.Put("proxies", bpfmap.ProxyKey(ns.Cookie, 0), make([]byte, 16), ebpf.UpdateNoExist))
	tables.Only = slices.DeleteFunc(bpfmap.MapNames(), func(name string) bool { return name == "verdicts" || name == "proxies" })
	fail(tables.WriteRows(ns.Cookie, r.Desired(), r.IPv6))
	fail(attachLookupOfLayout2(tables, a.node.Paths(), ns))
	r.Finish(r.Desired())
	fail(a.node.Paths().WriteRecord(r))
}

// attachLookupOfLayout2 loads and attaches the namespace's program as that version did,
// with the cookie among its instructions.
func attachLookupOfLayout2(tables *bpfmap.Tables, paths store.Paths, ns *host.Namespace) error {
	const marker = 0x574549524e53434b
	spec, err := bpfmap.LoadLookup()
	if err != nil {
		return err
	}
	replacements := make(map[string]*ebpf.Map)
	for name := range spec.Maps {
		if replacements[name], err = tables.Table(name); err != nil {
			return err
		}
	}
	code := spec.Programs[program.LookupName].Instructions
	for i := range code {
		if code[i].OpCode.IsDWordLoad() && code[i].Constant == marker {
			code[i].Constant = int64(ns.Cookie)
		}
	}
	collection, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replacements})
	if err != nil {
		return err
	}
	defer collection.Close()
	attached, err := link.AttachNetNs(int(ns.File.Fd()), collection.Programs[program.LookupName])
	if err != nil {
		return err
	}
	defer attached.Close()
	return errors.Join(os.MkdirAll(paths.Lookups(), 0o700), attached.Pin(paths.Lookup(ns.Cookie)))
}

// Connections to ever new origins run all the time while the node is brought from
// the layout of an older version to this one's. None is refused, none gets past
// the proxy, each has its origin.
func TestMigrationUnderLoad(t *testing.T) {
	t.Run("from layout 2", func(t *testing.T) {
		n := &node{Datapath: unloadedDatapath(t), t: t, remote: test.NewNetNS(t)}
		n.loadLayout2()
		a, b := n.newAlloc(), n.newAlloc()
		for _, alloc := range []*alloc{a, b} {
			alloc.addToLayout2()
			alloc.startProxy()
		}
		migrateUnderLoad(t, n, a, b, a.countsOfLayout2)
	})
	// All that can differ does, in what it holds: rows are copied and written again,
	// listeners registered anew.
	t.Run("of every map but indexes", func(t *testing.T) {
		n := &node{Datapath: unloadedDatapath(t), t: t, remote: test.NewNetNS(t)}
		n.loadFormer(bpfmap.Layout, func(name string, spec *ebpf.MapSpec) {
			if spec.MaxEntries > 1 && name != "indexes" {
				spec.MaxEntries /= 2
			}
		})
		a, b := n.newAlloc(), n.newAlloc()
		for _, alloc := range []*alloc{a, b} {
			alloc.add()
			alloc.startProxy()
		}
		editControl(t, n.Datapath, func(row *bpfmap.BpfControl) { row.Layout = bpfmap.Layout + 1 })
		migrateUnderLoad(t, n, a, b, func() uint64 {
			tables := &bpfmap.Tables{Dir: n.Paths().Maps(), Open: make(map[string]*ebpf.Map)}
			defer tables.Close()
			counts, _, err := tables.Verdicts(a.Cookie())
			if err != nil {
				t.Fatal(err)
			}
			return counts[bpfmap.Redirected.String()]
		})
	})
}

func migrateUnderLoad(t *testing.T, n *node, a, b *alloc, redirected func() uint64) {
	t.Helper()
	test.Echo(t, n.remote, "tcp", "[::]:4321")
	test.Echo(t, a.NetNS, "tcp", "[::]:4321")
	if status, err := n.Status(); err != nil || status.Healthy() {
		t.Errorf("status before: %v, %v; want the other layout named", status.Problems, err)
	}

	var stop atomic.Bool
	var connections atomic.Int64
	var load sync.WaitGroup
	keep := func(client *test.Client, destination func(i int) netip.Addr, server string) {
		load.Go(func() {
			for i := 0; !stop.Load() && !t.Failed(); i++ {
				want := netip.AddrPortFrom(destination(i), 4321)
				answer, err := client.Ask("tcp", want.String())
				if err != nil || answer.Server != server || answer.Origin != want {
					t.Errorf("during the migration: dialled %s: %+v, %v; want that origin and an answer of %s", want, answer, err, server)
				}
				connections.Add(1)
			}
		})
	}
	ever := func(prefix byte) func(int) netip.Addr {
		return func(i int) netip.Addr { return netip.AddrFrom4([4]byte{198, prefix, byte(i >> 8), byte(i)}) }
	}
	for _, destination := range []func(int) netip.Addr{
		ever(18), ever(19),
		func(int) netip.Addr { return remote4(1) },
		func(i int) netip.Addr { return netip.MustParseAddr(fmt.Sprintf("2001:db8::%x", i+1)) },
	} {
		client := test.NewClient(t, test.Spec{NetNS: a.NetNS, Cgroup: a.taskCg, UID: taskUID, GID: taskUID})
		keep(client, destination, a.outbound.Name)
	}
	keep(test.NewClient(t, test.Spec{NetNS: n.remote}), func(int) netip.Addr { return a.v4 }, a.inbound.Name)
	more := func(what string) {
		t.Helper()
		seen := connections.Load()
		test.Eventually(t, func() error {
			if connections.Load() < seen+50 {
				return fmt.Errorf("%d connections", connections.Load()-seen)
			}
			return nil
		}, what)
	}
	more("connections before the migration")
	former := attachFormer(t, n.Datapath)
	before := redirected()
	result, err := n.Load()
	if err != nil {
		t.Fatalf("%+v", err)
	}
	if text := fmt.Sprint(result.Did); !result.Changed || !strings.Contains(text, fmt.Sprintf("migrated to layout %d", bpfmap.Layout)) || len(result.Problems) > 0 {
		t.Errorf("load did %q, problems %v", result.Did, result.Problems)
	}
	more("connections after the migration")
	stop.Store(true)
	load.Wait()
	t.Logf("%d connections", connections.Load())

	healthy(t, n.Datapath)
	for _, pin := range former {
		if _, err := os.Lstat(pin); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s of the former version is left: %v", pin, err)
		}
	}
	if counts := a.counts(); counts[bpfmap.Redirected] < before || before == 0 {
		t.Errorf("redirected is counted %d times, before the migration it was %d", counts[bpfmap.Redirected], before)
	}
	for verdict, count := range a.counts() {
		if verdict != bpfmap.Redirected && verdict != bpfmap.Inbound && verdict != bpfmap.Listener {
			t.Errorf("verdict %s was counted %d times", verdict, count)
		}
	}
	for _, alloc := range []*alloc{a, b} {
		alloc.works()
	}
	if again, err := n.Load(); err != nil || again.Changed {
		t.Errorf("the next load did %q, %v; want nothing", again.Did, err)
	}
	held := kernelObjects(t, n.Datapath)
	held.settle(t, [3]int{len(bpfmap.MapNames()) + len(program.CallNames()), len(program.ProgramNames()) + len(filter.FilterNames()) + 3, len(program.ProgramNames()) + 2})
	if err := n.Remove(a.key); err != nil {
		t.Fatal(err)
	}
	if err := n.Remove(b.key); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, n.Datapath)
}

// attachFormer pins a program and a map that the other version alone has.
func attachFormer(t *testing.T, d *Datapath) (pins []string) {
	t.Helper()
	pins = []string{d.Paths().Link("weir_former"), filepath.Join(d.Paths().Maps(), "former")}
	n := attachNeighbour(t)
	if err := errors.Join(n.link.Pin(pins[0]), n.counter.Pin(pins[1])); err != nil {
		t.Fatal(err)
	}
	return pins
}

// countsOfLayout2 is how often layout 2 counted a redirect.
func (a *alloc) countsOfLayout2() uint64 {
	a.node.t.Helper()
	table, err := ebpf.LoadPinnedMap(filepath.Join(a.node.Paths().Maps(), "verdicts"), nil)
	if err != nil {
		a.node.t.Fatal(err)
	}
	defer table.Close()
	var counts [27]uint64
	if err := table.Lookup(a.Cookie(), &counts); err != nil {
		a.node.t.Fatal(err)
	}
	return counts[0]
}
