// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/web"
	"github.com/weirmesh/weir/test"
)

// What a container inside of an allocation dials is a flow that names the allocation that
// it passes, by which it is found, and an edge of the map from there.
func TestForwardedConnectionsAreOnTheMap(t *testing.T) {
	n, id, mesh, task := shopNode(t, func(*configfile.Config) {})
	inner, outside := test.NewNetNS(t), test.NewNetNS(t)
	prefix := netip.MustParsePrefix
	test.Veth(t, test.VethEnd{NetNS: inner, Addrs: []netip.Prefix{prefix("172.30.0.2/24")}, DefaultRoute: true},
		test.VethEnd{NetNS: mesh, Name: "docker0", Addrs: []netip.Prefix{prefix("172.30.0.1/24")}})
	test.Veth(t, test.VethEnd{NetNS: mesh, Name: "eth1", Addrs: []netip.Prefix{prefix("198.51.100.1/24")}},
		test.VethEnd{NetNS: outside, Addrs: []netip.Prefix{prefix("198.51.100.7/24")}, DefaultRoute: true})
	mesh.Do(func() {
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
			t.Error(err)
		}
	})
	test.Echo(t, outside, "tcp4", "198.51.100.7:443")
	n.recording(task)

	var flow api.Flow
	test.Eventually(t, func() error {
		if _, err := test.Ask(inner, "tcp4", "198.51.100.7:443"); err == nil {
			t.Fatal("a transparent allocation forwards past its proxy")
		}
		list := n.history(api.FlowQuery{Job: "shop", Port: 443})
		if len(list) == 0 {
			return fmt.Errorf("no flow of job shop to port 443")
		}
		flow = list[0]
		return nil
	}, "the connection to be recorded")
	through := api.FlowThrough{AllocID: id, Namespace: "prod", Job: "shop", TaskGroup: "front"}
	if flow.Direction != api.DirectionForwarded || flow.Verdict != "refused_forwarded" || flow.Through != through ||
		flow.Source.IP != netip.MustParseAddr("172.30.0.2") || flow.Source.AllocID != "" {
		t.Errorf("flow = %+v, want one from 172.30.0.2 through %+v", flow, through)
	}
	if list := n.history(api.FlowQuery{Alloc: id[:8], Verdicts: []string{"refused_forwarded"}}); len(list) == 0 {
		t.Error("it is no flow of the allocation")
	}
	graph := n.agent.server.Map().Graph()
	i := slices.IndexFunc(graph.Edges, func(e web.Edge) bool { return e.From == id && e.To == "to address 198.51.100.7:443" })
	if i < 0 || graph.Edges[i].Refused == 0 {
		t.Errorf("edges = %+v, want a refused one from %s to 198.51.100.7:443", graph.Edges, id)
	}
}
