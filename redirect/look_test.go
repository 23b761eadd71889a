// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"reflect"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// A look at the node asks little of the kernel for each workload: it walks the table of
// listeners once, and does not ask for the slots of each port of each proxy, of which
// there are hundreds. Where one workload is damaged, a second look, for what may have been
// half of a change, is at that one alone.
func TestLookAtAllWalksOnce(t *testing.T) {
	d := newDatapath(t)
	const few, more = inspect.FewWorkloads + 1, 10
	list := plainWorkloads(t, d, few)
	calls := test.CountMapWrites(t)
	look := func(problems int) uint64 {
		t.Helper()
		if _, err := d.Workloads(); err != nil { // what the library finds out only once
			t.Fatal(err)
		}
		calls.Calls()
		status, err := d.Workloads()
		if err != nil {
			t.Fatal(err)
		}
		counted, found := calls.Calls(), 0
		for _, w := range status {
			found += len(w.Problems)
		}
		if found != problems {
			t.Fatalf("%d problems of %+v, want %d", found, status, problems)
		}
		return counted
	}
	damaged := list[0].NetNS
	const each = 40 // its rows one by one, and its lookup program
	before := look(0)
	plainWorkloads(t, d, more)
	after := look(0)
	if added := (after - before) / more; added > each {
		t.Errorf("a workload costs a look %d calls of bpf, want at most %d", added, each)
	}
	cookie, err := host.Cookie(damaged)
	if err != nil {
		t.Fatal(err)
	}
	detachPinned(t, d.Paths().Lookup(cookie))
	if twice := look(1); twice > after+after/2 {
		t.Errorf("two looks of which one finds damage take %d calls of bpf, one took %d", twice, after)
	}
}

// A look at some workloads is at these alone.
func TestLookAtSome(t *testing.T) {
	d := newDatapath(t)
	wanted := plainWorkloads(t, d, 3)[1].Key
	list, err := d.Workloads(wanted, workload.AttachmentID{ContainerID: "gone", IfName: "eth0"})
	if err != nil || len(list) != 1 || list[0].Key != wanted || len(list[0].Problems) != 0 {
		t.Errorf("Workloads(%s, gone) = %+v, %v; want the one that is there", wanted, list, err)
	}
}

// BenchmarkLook is what 'weir status' and 'weir workloads' ask of the kernel for each of
// the node's workloads.
func BenchmarkLook(b *testing.B) {
	d := newDatapath(b)
	const count = 50
	plainWorkloads(b, d, count)
	for b.Loop() {
		if _, err := d.Workloads(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/count, "ns/workload")
}

// Several looks at a namespace enter it once, and see what one by one see.
func TestLooksWithinANamespaceEnterItOnce(t *testing.T) {
	d := newDatapath(t)
	record, ns, err := d.OpenWorkload(plainWorkloads(t, d, 1)[0].Key)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	type seen struct {
		routed    bool
		listening []host.Socket
		changed   int
	}
	look := func(ns *host.Namespace) (s seen) {
		t.Helper()
		copied := *record
		changed, err := inspect.ObserveSources(&copied, ns)
		s.changed = len(changed)
		if err == nil {
			s.routed, err = ns.HasRoutes(record.Desired(), record.IPv6)
		}
		if err == nil {
			s.listening, err = ns.Listening()
		}
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	want := look(ns)
	err = host.Within(record.NetNS, func(in *host.Namespace) error {
		in.File = nil // nobody can enter it any more
		if got := look(in); !reflect.DeepEqual(got, want) || !got.routed {
			t.Errorf("within it: %+v, one by one: %+v", got, want)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if cookie, err := host.Cookie(ns.File.Name()); err != nil || cookie != record.Cookie {
		t.Errorf("afterwards the namespace is %d, %v; want %d", cookie, err, record.Cookie)
	}
}

// A DEL costs the same among however many workloads: it walks through no table. What a call
// left that died half way is looked for by the one that repeats it.
func TestRemoveWalksThroughNoTable(t *testing.T) {
	d := newDatapath(t)
	list := plainWorkloads(t, d, 2)
	calls := test.CountMapWrites(t)
	if err := d.Remove(list[0].Key); err != nil {
		t.Fatal(err)
	}
	if walks := calls.Walks(); walks != 0 {
		t.Errorf("a DEL made %d calls that walk through tables, want none", walks)
	}
	cookie, err := host.Cookie(list[1].NetNS)
	if err != nil {
		t.Fatal(err)
	}
	r, err := d.Paths().ReadRecord(list[1].Key)
	if err != nil {
		t.Fatal(err)
	}
	tables, err := bpfmap.OpenTables(d.Paths().Maps())
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	if err := errors.Join(tables.Delete("workloads", cookie), d.Paths().RemoveRecord(r.Key)); err != nil {
		t.Fatal(err)
	}
	if err := d.Remove(r.Key); err != nil {
		t.Fatal(err)
	}
	if left, err := tables.HasBudget(cookie); left || err != nil {
		t.Errorf("the row that a dead call left is there: %t, %v", left, err)
	}
}
