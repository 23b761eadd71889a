// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/reconcile"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// operation is a call that a process of its own makes, to be killed in.
type operation struct {
	Paths      store.Paths
	Do         string // "add", "remove", "load", "configure"; nothing where it is empty
	Attachment Attachment
	Others     []Attachment // that are added with it
	Changes    []reconcile.MeshChange
}

// operateFunc is the helper that runs operations.
const operateFunc = "redirect.operate"

func serveOperations([]string) error {
	return test.Serve(func(o operation) (struct{}, error) {
		d := New(o.Paths)
		var err error
		switch o.Do {
		case "add":
			err = errors.Join(d.AddAll(append(o.Others, o.Attachment))...)
		case "remove":
			err = d.Remove(o.Attachment.Key)
		case "load":
			_, err = d.Load()
		case "configure":
			err = errors.Join(d.SetMeshConfigs(o.Changes)...)
		}
		return struct{}{}, err
	})
}

// killer runs operations in processes and kills these in the middle.
type killer struct {
	node  *node
	aside *test.NetNS   // where the processes live
	whole time.Duration // that the operation takes, at best
}

func newKiller(n *node) *killer {
	return &killer{node: n, aside: test.NewNetNS(n.t)}
}

// run does the operation to its end and learns how long that takes.
func (k *killer) run(t *testing.T, o operation) {
	t.Helper()
	o.Paths = k.node.Paths()
	p := test.Helper(t, test.Spec{NetNS: k.aside}, operateFunc)
	defer p.Stop()
	if err := p.Call(operation{}, nil); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if err := p.Call(o, nil); err != nil {
		t.Fatalf("%s: %v", o.Do, err)
	}
	if took := time.Since(start); k.whole == 0 || took < k.whole {
		k.whole = took
	}
}

// kill starts the operation and kills its process after the share of the time
// that the whole operation takes. It reports whether the process was done.
func (k *killer) kill(t *testing.T, o operation, share float64) (done bool) {
	t.Helper()
	o.Paths = k.node.Paths()
	p := test.Helper(t, test.Spec{NetNS: k.aside}, operateFunc)
	if err := p.Call(operation{}, nil); err != nil {
		t.Fatal(err)
	}
	answered := make(chan error, 1)
	start := time.Now()
	go func() { answered <- p.Call(o, nil) }()
	delay := time.Duration(share * float64(k.whole))
	for time.Since(start) < delay { // a timer is coarser than the steps
		select {
		case err := <-answered:
			answered <- err
			delay = 0
		default:
		}
	}
	p.Stop()
	return <-answered == nil
}

// times runs what is killed at every point of a whole operation. It fails the
// test unless the kills hit before, within and after the operation.
func (k *killer) times(t *testing.T, o operation, n int, prepare func(), aftermath func(i int)) {
	t.Helper()
	for i := range 4 {
		prepare()
		k.run(t, o)
		aftermath(i)
	}
	outcomes := make(map[string]int)
	one := func(i int, share float64) (done bool) {
		prepare()
		before := k.programs()
		done = k.kill(t, o, share)
		outcome := "killed, " + k.outcome(t, o.Attachment.Key)
		if k.programs() != before {
			outcome += ", other programs"
		}
		if done {
			outcome = "done"
		}
		outcomes[outcome]++
		aftermath(i)
		if t.Failed() {
			t.Fatalf("after kill %d: %s", i, outcome)
		}
		return done
	}
	for i := range n {
		one(i, 2*float64(i)/float64(n))
	}
	// What is visible of an operation may lie in its last moments: look for
	// them where a kill comes too late as often as not.
	share := 1.0
	for i := n; n >= 40 && len(outcomes) < 3 && i < 5*n; i++ {
		if one(i, share) {
			share -= 0.01
		} else {
			share += 0.01
		}
	}
	t.Logf("%s takes %v; outcomes: %v", o.Do, k.whole, outcomes)
	if n >= 40 && len(outcomes) < 3 {
		t.Errorf("outcomes of %d kills: %v; want them at more than %d points", n, outcomes, len(outcomes))
	}
}

// programs are those at the root, by the IDs that their links name.
func (k *killer) programs() string {
	var ids []string
	for _, name := range program.ProgramNames() {
		pinned, err := link.LoadPinnedLink(k.node.Paths().Link(name), nil)
		if err != nil {
			continue
		}
		if info, err := pinned.Info(); err == nil {
			ids = append(ids, fmt.Sprint(info.Program))
		}
		pinned.Close()
	}
	return strings.Join(ids, " ")
}

// outcome describes what the kill left, as the disk shows it.
func (k *killer) outcome(t *testing.T, key workload.AttachmentID) string {
	t.Helper()
	text := "no record"
	r, err := k.node.Paths().ReadRecord(key)
	switch {
	case err == nil && r.State == store.Complete:
		text = "complete record"
	case err == nil:
		text = "incomplete record"
	case !errors.Is(err, store.ErrUnknown):
		t.Fatal(err)
	}
	if calls, err := os.ReadDir(k.node.Paths().Calls()); err == nil {
		text += fmt.Sprintf(", %d pins of the lookup program", len(calls))
	}
	if _, err := os.Stat(k.node.Paths().Staging()); err == nil {
		text += ", unfinished load"
	}
	if _, err := os.Stat(k.node.Paths().Maps()); err == nil {
		text += fmt.Sprintf(", %d tables", len(rowCounts(t, k.node.Datapath)))
	}
	return text
}

// right fails the test unless the workload is as a clean ADD makes it.
func (a *alloc) right(t *testing.T, rows map[string]int) {
	t.Helper()
	if diff := cmp.Diff(rows, rowCounts(t, a.node.Datapath)); diff != "" {
		t.Errorf("rows, compared with those of a clean ADD (-want +got):\n%s", diff)
	}
	healthy(t, a.node.Datapath)
	if v4, v6 := routesOf(t, a.NetNS); !v4 || !v6 {
		t.Errorf("routes: IPv4 %t, IPv6 %t", v4, v6)
	}
	a.works()
}

// gone removes the workload and fails the test where something is left of it.
func (a *alloc) gone(t *testing.T) {
	t.Helper()
	a.remove()
	nothingLeft(t, a.node.Datapath)
	if v4, v6 := routesOf(t, a.NetNS); v4 || v6 {
		t.Errorf("routes are left: IPv4 %t, IPv6 %t", v4, v6)
	}
}

func TestKilledAdd(t *testing.T) {
	for _, tc := range []struct {
		name    string
		prepare func(a, former *alloc)
	}{
		{"of a new workload", func(_, _ *alloc) {}},
		{"with another request", func(a, _ *alloc) { a.add() }},
		{"in a namespace of another key", func(a, _ *alloc) {
			other := *a
			other.key.ContainerID = "other"
			other.add()
		}},
		{"of a key with a new namespace", func(a, former *alloc) {
			other := *former
			other.key = a.key
			other.add(full)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			a, former := n.newAlloc(), n.newAlloc()
			a.startProxy()
			a.add(full)
			rows := rowCounts(t, n.Datapath)
			a.gone(t)
			request := a.request()
			full(&request)
			add := operation{Do: "add", Attachment: Attachment{Key: a.key, NetNS: a.Path, Request: request}}
			newKiller(n).times(t, add, test.Scale(80), func() { tc.prepare(a, former) }, func(i int) {
				if i%2 == 0 {
					a.add(full)
					a.right(t, rows)
				}
				a.remove()
				// The other key's, where the kill came before it was taken over.
				if err := n.Remove(workload.AttachmentID{ContainerID: "other", IfName: "eth0"}); err != nil {
					t.Fatal(err)
				}
				a.gone(t)
			})
		})
	}
}

func TestKilledRemove(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.startProxy()
	a.add(full)
	rows := rowCounts(t, n.Datapath)
	k := newKiller(n)
	k.times(t, operation{Do: "remove", Attachment: Attachment{Key: a.key}}, test.Scale(160), func() {
		a.add(full)
		a.works() // origins to remove
	}, func(i int) {
		if i%2 == 0 {
			a.add(full)
			wantRowsOfAnAdd(t, n, rows)
			a.works()
		}
		a.gone(t)
	})
}

// wantRowsOfAnAdd compares the tables with those of a clean ADD. What was dialled does not
// count: a kill before the first step leaves the origins in use.
func wantRowsOfAnAdd(t *testing.T, n *node, rows map[string]int) {
	t.Helper()
	now := rowCounts(t, n.Datapath)
	delete(now, "origins")
	delete(now, "indexes")
	if diff := cmp.Diff(rows, now); diff != "" {
		t.Errorf("rows, compared with those of a clean ADD (-want +got):\n%s", diff)
	}
}

func TestKilledLoad(t *testing.T) {
	for _, tc := range []struct {
		name    string
		prepare func(t *testing.T, n *node)
	}{
		{"of an empty node", func(t *testing.T, n *node) {
			if _, err := n.Unload(); err != nil {
				t.Fatal(err)
			}
		}},
		{"after the pins were lost", func(t *testing.T, n *node) {
			if err := os.RemoveAll(n.Paths().PinDir); err != nil {
				t.Fatal(err)
			}
		}},
		{"after the tables were lost", func(t *testing.T, n *node) {
			if err := os.RemoveAll(n.Paths().Maps()); err != nil {
				t.Fatal(err)
			}
		}},
		{"after the lookup program was lost", func(t *testing.T, n *node) {
			if err := os.RemoveAll(n.Paths().Calls()); err != nil {
				t.Fatal(err)
			}
		}},
		{"of another layout", func(t *testing.T, n *node) {
			editControl(t, n.Datapath, func(row *bpfmap.BpfControl) { row.Layout = bpfmap.Layout + 1 })
		}},
		{"of another version", func(t *testing.T, n *node) { staleDigest(t, n.Datapath) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.startProxy()
			a.add(full)
			rows, want := rowCounts(t, n.Datapath), kernelObjects(t, n.Datapath).counts()
			k := newKiller(n)
			k.times(t, operation{Do: "load"}, test.Scale(40), func() { tc.prepare(t, n) }, func(int) {
				if _, err := n.Load(); err != nil {
					t.Fatal(err)
				}
				if tc.name == "of an empty node" {
					a.add(full)
				}
				now := rowCounts(t, n.Datapath)
				delete(now, "origins")
				delete(now, "indexes")
				if diff := cmp.Diff(rows, now); diff != "" {
					t.Errorf("rows, compared with those of a clean ADD (-want +got):\n%s", diff)
				}
				healthy(t, n.Datapath)
				a.works()
				held := kernelObjects(t, n.Datapath)
				held.settle(t, want)
			})
		})
	}
}
