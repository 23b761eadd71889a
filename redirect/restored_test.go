// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// restored is what Consul adds to the workload of the tests of lost records.
func restored() workload.MeshConfig {
	return workload.MeshConfig{
		InboundPort: 20001, OutboundPort: outboundPort, ExcludeInboundPorts: []uint16{8080}, Guard: workload.GuardEnforce,
		Upstreams: []workload.Upstream{{Name: "db", Addresses: []netip.Addr{netip.MustParseAddr("240.0.0.1")}, Listener: netip.MustParseAddrPort("127.0.0.1:9001")}},
	}
}

// A record is lost while its rows are in force, and ADD makes it anew with what Consul
// adds: at no moment does a connection go anywhere else than before.
func TestRestoredRecordIsWholeFromItsFirstMoment(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) { r.InboundPort = 0 })
	a.outbound = a.serve(proxyUID, a.proxyCg, "tcp4", outboundListener)
	inbound := a.serve(proxyUID, a.proxyCg, "tcp4", "0.0.0.0:20001")
	upstream := a.serve(proxyUID, a.proxyCg, "tcp4", "127.0.0.1:9001")
	app := a.serve(taskUID, a.taskCg, "tcp4", "0.0.0.0:8080")
	mesh := restored()
	if err := n.SetMeshConfig(a.key, mesh); err != nil {
		t.Fatal(err)
	}
	wantMesh := func() {
		t.Helper()
		list, err := n.Records()
		if err != nil || len(list) != 1 {
			t.Fatalf("records %+v, %v; want one", list, err)
		}
		equal := cmp.Options{cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })}
		if diff := cmp.Diff(mesh, list[0].MeshConfig, equal); diff != "" {
			t.Errorf("what Consul adds, on record (-want +got):\n%s", diff)
		}
	}
	request := a.request()
	request.InboundPort = 0
	load := newTraffic(t)
	load.dial(test.Spec{NetNS: a.NetNS, Cgroup: a.taskCg, UID: taskUID, GID: taskUID}, "240.0.0.1:80", upstream)
	load.dial(test.Spec{NetNS: a.NetNS, Cgroup: a.taskCg, UID: taskUID, GID: taskUID}, "192.0.2.1:80", a.outbound)
	load.dial(test.Spec{NetNS: n.remote}, addrPort(a.v4, 9999), inbound)
	load.dial(test.Spec{NetNS: n.remote}, addrPort(a.v4, 8080), app)
	for range test.Scale(20) {
		if err := os.RemoveAll(n.Paths().Workloads()); err != nil {
			t.Fatal(err)
		}
		if err := n.Add(Attachment{Key: a.key, NetNS: a.Path, Request: request, MeshConfig: &mesh}); err != nil {
			t.Fatal(err)
		}
		wantMesh()
	}
	load.end()
	healthy(t, n.Datapath)

	// With the maps goes what was in force; what is on record stays as it is.
	if _, err := n.Unload(); err != nil {
		t.Fatal(err)
	}
	if err := n.Add(Attachment{Key: a.key, NetNS: a.Path, Request: request, MeshConfig: &mesh}); err != nil {
		t.Fatal(err)
	}
	wantMesh()
	if err := n.Add(Attachment{Key: a.key, NetNS: a.Path, Request: request, MeshConfig: &workload.MeshConfig{}}); err != nil {
		t.Fatal(err)
	}
	wantMesh()
}

// A cgroup that is known not to be the proxy's does not become it again where record and
// maps are lost, although it listens first.
func TestRestoredRecordKnowsWhoIsNoProxy(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	stranger := a.serve(proxyUID, a.taskCg, "tcp4", outboundListener)
	if err := n.RejectProxyCgroup(a.key, a.taskCg.ID); err != nil {
		t.Fatal(err)
	}
	list, err := n.Records()
	if err != nil || len(list) != 1 || !slices.Equal(list[0].RejectedCgroups, []uint64{a.taskCg.ID}) {
		t.Fatalf("records %+v, %v; want one that rejects cgroup %d", list, err, a.taskCg.ID)
	}
	if _, err := n.Unload(); err != nil {
		t.Fatal(err)
	}
	if err := n.Add(Attachment{Key: a.key, NetNS: a.Path, Request: a.request(), RejectedCgroups: list[0].RejectedCgroups}); err != nil {
		t.Fatal(err)
	}
	if answer, err := a.ask("tcp4", "192.0.2.1:80"); err == nil {
		t.Errorf("answered by %+v, %s being the rejected one", answer, stranger.Name)
	}
	stranger.Stop()
	a.startProxy()
	a.identity(inspect.IdentityCgroup, a.proxyCg.ID, false)
	if answer, err := a.ask("tcp4", "192.0.2.1:80"); err != nil || answer.Server != a.outbound.Name {
		t.Errorf("answered by %+v, %v; want the proxy", answer, err)
	}
}
