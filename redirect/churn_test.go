// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

func TestCollectTakesItsOwnNetworkAndTheDead(t *testing.T) {
	n := newNode(t)
	live, stale, foreign := n.newAlloc(), n.newAlloc(), n.newAlloc()
	live.add(full)
	stale.add(full)
	foreign.add(full, func(r *workload.Request) { r.Network = "weir" })
	dead := func(t *testing.T) {
		ns := test.NewNetNS(t)
		request := workload.Request{Network: "weir"}
		full(&request)
		if err := n.Add(Attachment{Key: workload.AttachmentID{ContainerID: "dead", IfName: "eth0"}, NetNS: ns.Path, Request: request}); err != nil {
			t.Fatal(err)
		}
		if err := n.Add(Attachment{Key: workload.AttachmentID{ContainerID: "orphan", IfName: "eth0"}, NetNS: test.NewNetNS(t).Path, Request: request}); err != nil {
			t.Fatal(err)
		}
		if err := n.Paths().RemoveRecord(workload.AttachmentID{ContainerID: "orphan", IfName: "eth0"}); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("allocation", dead)
	removed, err := n.GC("nomad", []workload.AttachmentID{live.key})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]workload.AttachmentID{stale.key}, removed); diff != "" {
		t.Errorf("removed (-want +got):\n%s", diff)
	}
	// The kernel destroys a namespace a moment after its last reference.
	test.Eventually(t, func() error {
		if _, err := n.GC("nomad", []workload.AttachmentID{live.key}); err != nil {
			return err
		}
		list, err := n.Workloads()
		if err != nil {
			return err
		}
		var keys []workload.AttachmentID
		for _, w := range list {
			keys = append(keys, w.Key)
		}
		if !slices.Equal(keys, []workload.AttachmentID{live.key, foreign.key}) {
			return fmt.Errorf("workloads = %v, want %v", keys, []workload.AttachmentID{live.key, foreign.key})
		}
		return nil
	}, "the dead to be collected")
	stale.free()
	live.startProxy()
	live.works()
	test.Eventually(t, func() error {
		if _, err := n.GC("nomad", []workload.AttachmentID{live.key}); err != nil {
			return err
		}
		entries, err := os.ReadDir(n.Paths().Lookups())
		if err != nil || len(entries) != 2 {
			return errors.Join(err, errors.New("lookup links are left"))
		}
		return nil
	}, "orphans to be collected")
	for _, a := range []*alloc{live, foreign} {
		a.remove()
	}
	nothingLeft(t, n.Datapath)
}

// TestChurnLeavesNothing adds and removes workloads in a handful of namespaces
// whose keys change, some twice, some with connections, some never removed but
// taken over, and looks everywhere afterwards.
func TestChurnLeavesNothing(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.startProxy()
	held := kernelObjects(t, n.Datapath)
	want, descriptors := held.counts(), 0
	var died []func() error
	var rounds int
	t.Run("rounds", func(t *testing.T) {
		var spaces []*test.NetNS
		for range 4 {
			ns := test.NewNetNS(t)
			died = append(died, witness(n.t, ns))
			spaces = append(spaces, ns)
		}
		// Every combination of what follows comes once in 2,100 rounds, and what each of them
		// left, or each hundredth, would be seen.
		for ; rounds < test.Scale(2_100); rounds++ {
			ns := spaces[rounds%len(spaces)]
			key := workload.AttachmentID{ContainerID: fmt.Sprintf("churn-%d", rounds), IfName: "eth0"}
			request := workload.Request{Network: "nomad", ProxyUID: proxyUID}
			if rounds%3 == 0 {
				full(&request)
			}
			adds := 1 + rounds%2
			for range adds {
				if err := n.Add(Attachment{Key: key, NetNS: ns.Path, Request: request}); err != nil {
					t.Fatalf("round %d: %v", rounds, err)
				}
			}
			if rounds == 0 {
				descriptors = test.OpenFiles(t)
			}
			if rounds%7 == 6 {
				continue // the next one in this namespace takes it over
			}
			if err := n.Remove(key); err != nil {
				t.Fatalf("round %d: %v", rounds, err)
			}
			if rounds%100 == 0 {
				a.add(full)
				a.works()
				a.remove()
			}
		}
		closedAgain(t, 0, descriptors+8) // clients and connections of works
		if _, err := n.GC("nomad", nil); err != nil {
			t.Fatal(err)
		}
		nothingLeft(t, n.Datapath)
		for _, ns := range spaces {
			if v4, v6 := routesOf(t, ns); v4 || v6 {
				t.Errorf("routes are left: IPv4 %t, IPv6 %t", v4, v6)
			}
		}
	})
	held.settle(t, want)
	for _, dead := range died {
		test.Eventually(t, dead, "the kernel to destroy the namespace: somebody holds a reference")
	}
}

// A namespace that dies under Weir is not held by it.
func TestWorkloadDoesNotHoldItsNamespace(t *testing.T) {
	d := newDatapath(t)
	var died func() error
	t.Run("namespace", func(inner *testing.T) {
		ns := test.NewNetNS(inner)
		died = witness(t, ns)
		if err := d.Add(Attachment{Key: workload.AttachmentID{ContainerID: "held", IfName: "eth0"}, NetNS: ns.Path}); err != nil {
			inner.Fatal(err)
		}
	})
	test.Eventually(t, died, "the kernel to destroy the namespace")
	status, err := d.Workloads()
	if err != nil || len(status) != 1 || len(status[0].Problems) != 1 {
		t.Errorf("workloads = %+v, %v; want one whose namespace is gone", status, err)
	}
	if _, err := d.GC("any", nil); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, d)
}
