// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// TestKill kills one part of the node after the other while clients ask on and on:
// only what the part itself carried is lost. Beside the mesh that it hits there is
// another, in the other network mode, which must lose nothing whatever is killed.
// Nomad's client is killed in TestLifeCycle.
func TestKill(t *testing.T) {
	node := nomad.Start(t, nomad.Options{NoDocker: true})
	serveNeighbour(t, node, ":80")
	t.Run("Mesh", func(t *testing.T) { killEach(t, node.For(t)) })
	if !t.Failed() {
		node.ExpectNothingLeft()
	}
}

func killEach(t *testing.T, n *nomad.Node) {
	const file = "testdata/jobs/life-mesh.nomad.hcl"
	bridge, own := runMesh(n, file, "kill", "bridge"), runMesh(n, file, "killown", "cni/weir")
	for _, each := range []struct {
		name           string
		test           func(*testing.T, *nomad.Node, *mesh)
		hit, bystander *mesh
	}{
		{"Agent", killAgent, bridge, own},
		{"Consul", killConsul, bridge, own},
		{"EnvoyOfClient", killEnvoyOfClient, bridge, own},
		{"EnvoyOfServer", killEnvoyOfServer, bridge, own},
		{"EnvoyOfClientInOwnNetwork", killEnvoyOfClient, own, bridge},
		{"EnvoyOfServerInOwnNetwork", killEnvoyOfServer, own, bridge},
	} {
		t.Run(each.name, func(t *testing.T) {
			n := n.For(t)
			hit, bystander := each.hit.on(n), each.bystander.on(n)
			if each.name == "Consul" { // its catalog may have them as failing when it is back
				hit.health = n.WatchHealth()
				bystander.health = hit.health
			}
			hit.wantWorks(t)
			bystander.wantWorks(t)
			loop := bystander.client.Loop("client", bystander.virtual(t))
			loop.Await(5, "answered", bystander.inMesh)
			each.test(t, n, hit)
			loop.Await(5, "answered at the end", bystander.inMesh)
			bystander.wantNothingLost(t, "bystander", loop.Stop())
		})
	}
}

// virtual is the server's URL by virtual IP: it can be asked without Consul's DNS.
func (m *mesh) virtual(t *testing.T) string {
	t.Helper()
	got := m.client.App("client", "lookup", m.id+"-server.virtual.consul")
	if len(got.Addresses) != 1 {
		t.Fatalf("look up the server: %s", got)
	}
	return "http://" + got.Addresses[0] + "/"
}

// killAgent: nothing that runs depends on the agent, nor on a load of the data path.
func killAgent(t *testing.T, n *nomad.Node, m *mesh) {
	loop := m.client.Loop("client", m.url)
	loop.Await(5, "answered", m.inMesh)
	n.Agent.Kill(t)
	loop.Await(10, "answered without the agent", m.inMesh)
	n.Command("weir", "load")
	loop.Await(5, "answered after weir load", m.inMesh)
	n.Agent.Start(t)
	loop.Await(10, "answered after the agent's start", m.inMesh)
	n.Agent.Restart(t)
	loop.Await(10, "answered after the agent's restart", m.inMesh)
	m.wantNothingLost(t, "agent", loop.Stop())
}

// killConsul: only names are not found while Consul is down. Where its catalog has a
// server as failing when it is back, requests to that one are Envoy's to refuse.
func killConsul(t *testing.T, n *nomad.Node, m *mesh) {
	byAddress, byName := m.client.Loop("client", m.virtual(t)), m.client.Loop("client", m.url)
	byAddress.Await(5, "answered", m.inMesh)
	byName.Await(5, "answered", m.inMesh)
	killed := time.Now()
	n.Consul.Kill(t)
	byName.Await(2, "not found", func(got wire.Outcome) bool { return got.Reply == nil })
	byAddress.Await(40, "answered without Consul", m.inMesh)
	n.Consul.Start(t)
	ready := time.Now()
	byName.Await(20, "answered after Consul's start", m.inMesh)
	byAddress.Await(20, "answered after Consul's start", m.inMesh)
	m.wantNothingLost(t, "by address", byAddress.Stop())
	lost := 0
	for _, got := range byName.Stop() {
		if m.inMesh(got) || m.isConsuls(got) {
			continue
		}
		lost++
		if end := got.At.Add(got.Took); end.Before(killed) || got.At.After(ready.Add(time.Second)) || got.To != "" {
			t.Errorf("lost by name, and not for want of Consul's DNS between %s and %s: %s", killed, ready, got)
		}
	}
	t.Logf("by name: %d requests lost while Consul was down for %s", lost, ready.Sub(killed).Round(time.Millisecond))
}

// killEnvoyOfClient: while the client's proxy is down each connection is refused, to
// the mesh and to elsewhere alike, and each is accounted for: none went past it.
func killEnvoyOfClient(t *testing.T, n *nomad.Node, m *mesh) {
	virtual, elsewhere := m.virtual(t), "http://"+nomad.NeighbourAddress+"/"
	outside := func(got wire.Outcome) bool { return got.Reply != nil && got.Reply.Task == "neighbour" }
	m.client.EventuallyGet("client", elsewhere, nil)
	var killed, back time.Time
	var mesh, plain []wire.Outcome
	grown := counted(m.client, func() {
		loop, other := m.client.Loop("client", virtual), m.client.Loop("client", elsewhere)
		loop.Await(5, "answered", m.inMesh)
		other.Await(5, "answered", outside)
		killed = time.Now()
		m.client.Kill("connect-proxy-" + m.id + "-client")
		loop.Await(5, "refused", func(got wire.Outcome) bool { return got.Errno == syscall.ECONNREFUSED })
		loop.Await(10, "answered again", m.inMesh)
		back = time.Now()
		other.Await(5, "answered again", outside)
		mesh, plain = loop.Stop(), other.Stop()
	})
	refused := uint64(0)
	for _, got := range slices.Concat(mesh, plain) {
		switch {
		case m.inMesh(got), outside(got):
		case got.Errno == syscall.ECONNREFUSED:
			refused++
			fallthrough
		default:
			if end := got.At.Add(got.Took); end.Before(killed) || got.At.After(back) {
				t.Errorf("lost although the proxy was up: %s", got)
			}
			if got.Reply != nil {
				t.Errorf("answered past the mesh: %s", got)
			}
		}
	}
	// Each attempt was redirected or refused, once, and went nowhere else.
	if all := uint64(len(mesh) + len(plain)); grown["redirected"]+grown["refused_no_proxy"] != all || grown["refused_no_proxy"] == 0 || grown["refused_no_proxy"] > refused {
		t.Errorf("verdicts grew by %v, want redirected and refused %d together, and at most %d refused", grown, all, refused)
	}
	for _, verdict := range []string{"local", "upstream", "uid_excluded", "cidr_excluded", "port_excluded"} {
		if grown[verdict] != 0 {
			t.Errorf("%d connections were let past the proxy as %s", grown[verdict], verdict)
		}
	}
	t.Logf("%d of %d requests refused, proxy down for at most %s", refused, len(mesh)+len(plain), back.Sub(killed).Round(time.Millisecond))
	m.wantWorks(t)
}

// killEnvoyOfServer: while the server's proxy is down the server is not reached at all,
// although it listens on all addresses.
func killEnvoyOfServer(t *testing.T, n *nomad.Node, m *mesh) {
	address := m.server.Workload().Addresses[0]
	loop := m.client.Loop("client", m.url)
	loop.Await(5, "answered", m.inMesh)
	killed := time.Now()
	refused := counted(m.server, func() {
		m.server.Kill("connect-proxy-" + m.id + "-server")
		test.Eventually(t, func() error {
			if got := n.Get(n.NetNS(), "http://"+address+":8080/"); got.Reply != nil {
				t.Fatalf("the application answered without its proxy: %s", got)
			}
			if list := loop.Outcomes(); len(list) == 0 || !list[len(list)-1].At.After(killed.Add(time.Second)) || !m.inMesh(list[len(list)-1]) {
				return fmt.Errorf("the last of %d: %s", len(list), list[len(list)-1:])
			}
			return nil
		}, "an answer after the proxy's death")
	})
	back := time.Now()
	loop.Await(10, "answered again", m.inMesh)
	if refused["refused_inbound_no_proxy"] == 0 {
		t.Errorf("verdicts grew by %v, want refused_inbound_no_proxy", refused)
	}
	lost, all := 0, loop.Stop()
	for _, got := range all {
		if m.inMesh(got) {
			continue
		}
		lost++
		if end := got.At.Add(got.Took); end.Before(killed) || got.At.After(back) || got.Reply != nil {
			t.Errorf("lost although the proxy was up, or answered past it: %s", got)
		}
	}
	t.Logf("%d of %d requests lost, proxy down for at most %s", lost, len(all), back.Sub(killed).Round(time.Millisecond))
	m.wantWorks(t)
}
