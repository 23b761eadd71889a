// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"testing"

	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// dies leaves the record as a process does that dies half way through a change.
func (a *alloc) dies() {
	a.node.t.Helper()
	r, err := a.node.Paths().ReadRecord(a.key)
	if err == nil {
		err = a.node.MarkIncomplete(r)
	}
	if err != nil {
		a.node.t.Fatal(err)
	}
}

// The change that follows one whose process died refuses nobody: listeners at the
// new port are registered before anybody is sent there.
func TestPortChangeAfterAProcessDiedHalfWay(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(a *alloc, set workload.MeshConfig) error
	}{
		{"change from Consul", func(a *alloc, set workload.MeshConfig) error { return a.node.SetMeshConfig(a.key, set) }},
		{"ADD", func(a *alloc, set workload.MeshConfig) error {
			request := a.request()
			request.InboundPort = set.InboundPort
			return a.node.Add(Attachment{Key: a.key, NetNS: a.Path, Request: request})
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add(func(r *workload.Request) { r.InboundPort = 0 })
			a.startProxy()
			inbound := [2]*test.ServerProcess{a.inbound, a.serve(proxyUID, a.proxyCg, "tcp4", "0.0.0.0:20001")}
			sets := meshConfigs()
			if err := tc.change(a, sets[0]); err != nil {
				t.Fatal(err)
			}
			load := newTraffic(t)
			for range 2 {
				load.dial(test.Spec{NetNS: n.remote}, addrPort(a.v4, 9999), inbound[0], inbound[1])
			}
			for i := range test.Scale(50) {
				a.dies()
				if err := tc.change(a, sets[(i+1)%2]); err != nil {
					t.Fatal(err)
				}
			}
			load.sawBoth(map[string]int{addrPort(a.v4, 9999): 2})
			healthy(t, n.Datapath)
		})
	}
}

// Whom the agent trusts after a process died is trusted all the same.
func TestTrustAfterAProcessDiedHalfWay(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.dies()
	a.trust("", a.proxyCg)
	a.identity(inspect.IdentityCgroup, a.proxyCg.ID, false)
	a.refusedWithoutProxy(proxyUID, a.taskCg)
	healthy(t, n.Datapath)
}

// What else is wrong with such a workload is not left out.
func TestStatusLooksAtAnIncompleteWorkload(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.dies()
	a.dropRow(t, "configs")
	list, err := n.Workloads()
	if err != nil || len(list) != 1 || len(list[0].Problems) != 2 {
		t.Errorf("workloads = %+v, %v; want one that did not finish and has no rows", list, err)
	}
	if _, err := n.Check(a.key, a.Path); err != nil {
		t.Fatal(err)
	}
	healthy(t, n.Datapath)
}
