// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"testing"

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
