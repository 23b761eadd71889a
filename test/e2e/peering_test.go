// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/consul"
)

// lanPort is where a mesh gateway listens for the proxies of its own datacenter.
const lanPort = 8444

// peeredNode is a node of one of two datacenters whose Consuls are peers. Of its
// allocations only the mesh gateway can be reached from the other one.
type peeredNode struct {
	gatewayNode
	gateway *meshAlloc
}

// newPeeredNodes makes a node in each of the two datacenters, and a network
// between them.
func newPeeredNodes(t *testing.T) (here, there peeredNode) {
	t.Helper()
	test.Need(t, test.Root, test.CgroupV2, test.BPF, test.Tool("ip"))
	start := func(datacenter string, number byte) peeredNode {
		addr, outside := netip.AddrFrom4([4]byte{10, 88, number, 1}), test.NewNetNS(t)
		ip(t, outside, "addr add %s dev lo", addr)
		n := makeMeshNode(t, outside, consul.Start(t, false, consul.In(outside, addr), consul.WithPeering(datacenter)))
		n.allocs = int(number) // whose addresses and IDs go on from there
		n.runAgent()
		return peeredNode{gatewayNode: gatewayNode{n}}
	}
	here, there = start("dc1", 0), start("dc2", 100)
	ends := [...]netip.Prefix{netip.MustParsePrefix("10.89.0.1/24"), netip.MustParsePrefix("10.89.0.2/24")}
	test.Veth(t,
		test.VethEnd{NetNS: here.outside, Name: "wan", Addrs: ends[:1]},
		test.VethEnd{NetNS: there.outside, Name: "wan", Addrs: ends[1:]})
	for i, n := range []*peeredNode{&here, &there} {
		n.gateway = n.allocate("")
		n.gateway.startEnvoy(n.gateway.registerGateway("mesh", "mesh", map[string]uint16{"wan": gatewayPort, "lan": lanPort}), "-gateway", "mesh")
		other := []*peeredNode{&there, &here}[i]
		node := n.gateway.addr.As4()
		for _, addr := range []netip.Addr{netip.AddrFrom4([4]byte{10, 88, node[2] - 1, 1}), n.gateway.addr} {
			ip(t, other.outside, "route add %s via %s dev wan", addr, ends[i].Addr())
		}
	}
	here.consul.Peer(there.consul, "dc1", "dc2")
	return here, there
}

// A service of a peered datacenter, reached through its mesh gateway and the own
// one, with all four Envoys under Weir: by the upstream's port, by its virtual IP
// and by its name, in a plain connect job and in one with transparent_proxy. What
// the other datacenter's intentions forbid is refused by the proxy at its end.
func TestServiceOfAPeer(t *testing.T) {
	here, there := newPeeredNodes(t)

	apiAlloc := there.allocate("")
	apiAlloc.startEnvoy(apiAlloc.register("api", object{"Port": 20001}))
	server := test.EchoProcess(t, apiAlloc.spec(1000), "tcp4", "127.0.0.1:8080")
	there.consul.Put("/v1/config", object{"Kind": "exported-services", "Name": "default",
		"Services": []object{{"Name": "api", "Consumers": []object{{"Peer": "dc1"}}}}})
	intend := func(source, action string) {
		t.Helper()
		there.consul.Put("/v1/config", object{"Kind": "service-intentions", "Name": "api",
			"Sources": []object{{"Name": source, "Peer": "dc1", "Action": action}}})
	}
	// wantThrough dials once, through both gateways and with one handshake of TLS
	// between the proxies at the ends.
	wantThrough := func(t *testing.T, task held, target string) {
		t.Helper()
		local, remote := here.gateway.passed(t, gatewayPort), there.gateway.passed(t, gatewayPort)
		apiAlloc.wantProved(t, task, target, server.Name)
		if rose := here.gateway.passed(t, gatewayPort) - local; rose != 1 {
			t.Errorf("the dial of %s went %d times through the gateway of dc1, want once", target, rose)
		}
		if rose := there.gateway.passed(t, gatewayPort) - remote; rose != 1 {
			t.Errorf("the dial of %s went %d times through the gateway of dc2, want once", target, rose)
		}
	}
	const name = "api.virtual.dc2.consul:80"
	upstreams := []object{{"DestinationName": "api", "DestinationPeer": "dc2", "LocalBindPort": 9191, "MeshGateway": object{"Mode": "local"}}}
	var virtual string

	t.Run("plain connect", func(t *testing.T) {
		web := here.allocate("")
		web.startEnvoy(web.register("web", object{"Port": 20002, "Proxy": object{"Upstreams": upstreams}}))
		task, resolver := web.newHeld(), netip.AddrPortFrom(web.gate, here.consul.DNS)
		web.eventually("the virtual IP of the peer's service", func(o workload.MeshConfig) bool {
			if len(o.Upstreams) != 1 || len(o.Upstreams[0].Addresses) == 0 {
				return false
			}
			virtual = netip.AddrPortFrom(o.Upstreams[0].Addresses[0], 80).String()
			return true
		})
		intend("web", "allow")
		wantServed(t, task, "127.0.0.1:9191", server.Name) // by now all four proxies know all of it
		before := web.counted(t, bpfmap.ToUpstream)
		wantThrough(t, task, "127.0.0.1:9191")
		wantThrough(t, task, virtual)
		for _, network := range []string{"udp", "tcp"} {
			wantThrough(t, task.asking(network, resolver), name)
		}
		if rose := web.counted(t, bpfmap.ToUpstream) - before; rose != 3 {
			t.Errorf("%d connections were sent to the upstream's listener, want 3", rose)
		}
		intend("web", "deny")
		for _, target := range []string{"127.0.0.1:9191", virtual} {
			wantRefused(t, task, target)
		}
	})

	t.Run("transparent_proxy", func(t *testing.T) {
		gate := netip.AddrFrom4([4]byte{10, 88, byte(here.allocs + 1), 1})
		shop := here.allocate(fmt.Sprintf(
			`{"ProxyUserID":"101","ProxyInboundPort":0,"ProxyOutboundPort":15001,"ConsulDNSIP":%q,"ConsulDNSPort":%d}`, gate, here.consul.DNS))
		here.consul.Put("/v1/config", object{"Kind": "proxy-defaults", "Name": "global", "MeshGateway": object{"Mode": "local"}})
		shop.startEnvoy(shop.register("shop", object{"Port": 20003, "Proxy": object{"Mode": "transparent"}}))
		task, resolver := shop.newHeld(), netip.AddrPortFrom(gate, 53)
		intend("shop", "allow")
		wantServed(t, task, virtual, server.Name)
		before := shop.counted(t, bpfmap.Redirected)
		wantThrough(t, task, virtual)
		for _, network := range []string{"udp", "tcp"} {
			wantThrough(t, task.asking(network, resolver), name)
		}
		if rose := shop.counted(t, bpfmap.Redirected) - before; rose != 3 {
			t.Errorf("%d connections were sent to the proxy, want 3", rose)
		}
		intend("shop", "deny")
		wantRefused(t, task, virtual)
	})

	for _, n := range []peeredNode{here, there} {
		view, err := n.gateway.view()
		if err != nil || view.Mode != workload.ModeGateway || !slices.Equal(view.Open, []uint16{gatewayPort, lanPort}) || len(view.Problems) > 0 {
			t.Errorf("the agent shows %+v, %v; want a gateway open at %d and %d, without problems", view, err, gatewayPort, lanPort)
		}
	}
}

// passed is how many connections the gateway's listener has taken.
func (a *meshAlloc) passed(t *testing.T, port uint16) (count int) {
	t.Helper()
	count, err := a.listenerStat(fmt.Sprint(port), "downstream_cx_total")
	if err != nil {
		t.Fatal(err)
	}
	return count
}
