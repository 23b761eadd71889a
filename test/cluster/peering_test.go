// SPDX-License-Identifier: MPL-2.0

package cluster

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
)

// peering is two datacenters, each with mesh gateways of its own; what the one exports
// the other asks for.
type peering struct {
	t           *testing.T
	here, there *production
	clients     *nomad.Job // with the gateways of here
	servers     *nomad.Job // with those of there
}

const (
	clientsFile = "testdata/peering.nomad.hcl"
	serversFile = "testdata/peered.nomad.hcl"
)

// TestPeering has clients of one datacenter ask for a service of another one, each by its
// name, by its virtual IP and by its upstream's listener, through mesh gateways of both,
// while instances, agents and the roots of both meshes are replaced. Both are as in
// [TestProduction].
func TestPeering(t *testing.T) {
	leader := nomad.Start(t, secure())
	p := &peering{t: t, here: newProduction(t, leader), there: newProduction(t, leader.Abroad(secure(), "dc2"))}
	p.here.peers = true
	leader.Peer(p.there.leader)
	for _, side := range []*production{p.here, p.there} {
		side.giveToken(side.leader)
		side.leader.AllowMeshGateway("mesh-gateway")
		side.leader.ConfigEntry(map[string]any{"Kind": "proxy-defaults", "Name": "global",
			"Config": map[string]any{"protocol": "http"}, "MeshGateway": map[string]any{"Mode": "local"}})
	}
	there := p.there.leader
	there.ConfigEntry(map[string]any{"Kind": "exported-services", "Name": "default", "Services": []any{
		map[string]any{"Name": "peered-server", "Consumers": []any{map[string]any{"Peer": "dc1"}}}}})
	there.ConfigEntry(map[string]any{"Kind": "service-intentions", "Name": "peered-server", "Sources": []any{
		map[string]any{"Name": "peering-transparent", "Peer": "dc1", "Action": "allow"},
		map[string]any{"Name": "peering-plain", "Peer": "dc1", "Action": "allow"}}})
	p.servers = there.Run(serversFile, "round", "0")
	for _, protocol := range []string{"udp", "tcp"} { // as a resolver in front of Consul's would have it
		leader.Command("iptables", "-t", "nat", "-A", "PREROUTING", "-d", nomad.NodeAddress, "-p", protocol, "--dport", "53",
			"-j", "DNAT", "--to-destination", nomad.NodeAddress+":8600")
	}
	p.clients = leader.Run(clientsFile)
	p.start()
	p.content()

	agent := func(n *nomad.Node) *nomad.Daemon { return n.Agent }
	ours := func() []proxy {
		return []proxy{{p.clients.Alloc("transparent"), "peering-transparent"}, {p.clients.Alloc("plain"), "peering-plain"}}
	}
	p.here.play([]scene{
		{name: "rolling update", run: func(t *testing.T, _ *cluster) {
			old := instances(p.servers, "server")
			p.servers.Update(serversFile, "round", "1")
			settled(t, p.servers, "server", len(old), old)
		}},
		{name: "Weir's agents", run: func(t *testing.T, c *cluster) { c.each(t, []*nomad.Node{leader, there}, agent) }},
		{name: "the clients' CA replaced", run: func(t *testing.T, _ *cluster) { replaceMeshCA(t, leader, ours()) }},
		{name: "the servers' CA replaced", run: func(t *testing.T, _ *cluster) {
			replaceMeshCA(t, there, proxies(p.servers, "server", "peered-server"))
		}},
	})
	p.content()
	for _, c := range p.here.clients {
		list := c.loop.Stop()
		t.Logf("%s: %d requests in all, answered by %d instances", c.group, len(list), len(c.instances))
	}
	p.clients.Stop()
	p.servers.Stop()
	for _, n := range []*nomad.Node{leader, there} {
		test.EventuallyIn(t, patience, n.Leftovers, "nothing to be left on "+n.Name())
	}
}

// start starts a client for each way to ask.
func (p *peering) start() {
	p.t.Helper()
	const name = "peered-server.virtual.dc2.consul"
	for _, group := range groups() {
		alloc := p.clients.Alloc(group)
		var virtual netip.AddrPort
		test.Eventually(p.t, func() error {
			got := alloc.App("client", "lookup", name)
			if len(got.Addresses) != 1 {
				return fmt.Errorf("look up %s: %s", name, got)
			}
			virtual = netip.AddrPortFrom(netip.MustParseAddr(got.Addresses[0]), 80)
			return nil
		}, group+": the virtual IP of the peer's service")
		for way, c := range map[string]*client{
			"name":       {target: virtual, host: name},
			"virtual IP": {target: virtual},
			"upstream":   {target: netip.MustParseAddrPort("127.0.0.1:9400")},
		} {
			c.group, c.alloc, c.job, c.caller = group+" by "+way, alloc, "peered", "peering-"+group
			c.start()
			p.here.clients = append(p.here.clients, c)
		}
	}
}

// content: no agent has a problem.
func (p *peering) content() {
	p.t.Helper()
	p.here.content()
	p.there.content()
}
