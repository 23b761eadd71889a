// SPDX-License-Identifier: MPL-2.0

package network

import (
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test"
)

// firewalld loads its rules anew while allocations run, and is stopped and started. What
// goes on goes on, and what comes to a host port comes in at once; what allocations begin
// passes again when the agent has put its rules back into firewalld's chain, and at once
// where the operator gave the bridge a zone that lets it through.
func TestFirewalldRestarts(t *testing.T) {
	n := newNode(t)
	firewalld := test.NewFirewalld(t, n.ns)
	server, _ := n.mapped(8080, 80).added(t, "server")
	client, _ := n.added(t, "client")
	test.Echo(t, server.ns, "tcp", ":80")
	test.Echo(t, n.outside, "tcp", ":7070")
	test.Echo(t, n.ns, "tcp", ":8600")
	in := map[string]*test.NetNS{"192.0.2.1:8080": n.outside, "[2001:db8::1]:8080": n.outside}
	out := []string{"192.0.2.2:7070", "[2001:db8::2]:7070"}
	kept := make(map[string]*net.TCPConn)
	for addr, from := range map[string]*test.NetNS{"192.0.2.1:8080": n.outside, "192.0.2.2:7070": client.ns} {
		from.Do(func() {
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			kept[addr] = conn.(*net.TCPConn)
		})
		t.Cleanup(func() { kept[addr].Close() })
	}
	own := n.run(t, "nft", "-s", "list", "table", "inet", "weir")
	for _, step := range []struct {
		name   string
		action func()
		closed bool // what allocations begin is refused until the repair
		lost   bool // the rules in firewalld's chain
		node   bool // allocations reach the node's own ports, as of Consul's resolver
	}{
		{"nothing", func() {}, false, false, false},
		{"reload", func() { firewalld.Command("--reload") }, true, true, false},
		{"stop", firewalld.Stop, false, false, true},
		{"start", firewalld.Start, true, true, false},
		{"a zone for the bridge, and reload", func() {
			firewalld.Command("--permanent", "--zone=trusted", "--add-interface="+bridge)
			firewalld.Command("--reload")
		}, false, true, true},
	} {
		step.action()
		for addr, conn := range kept {
			if _, err := test.AskAgain(conn); err != nil {
				t.Errorf("%s: the connection to %s: %v", step.name, addr, err)
			}
		}
		for addr, from := range in {
			if err := test.DialErr(t, from, addr); err != nil {
				t.Errorf("%s: to a host port, %s: %v", step.name, addr, err)
			}
		}
		if now := n.run(t, "nft", "-s", "list", "table", "inet", "weir"); now != own {
			t.Errorf("%s: rules of the own table:\n%s\nwant:\n%s", step.name, now, own)
		}
		if open := test.CanDial(t, client.ns, out[0]); open == step.closed {
			t.Errorf("%s: an allocation reaches the world before the repair: %t", step.name, open)
		}
		if open := test.CanDial(t, client.ns, "192.0.2.1:8600"); open != step.node {
			t.Errorf("%s: an allocation reaches the node: %t", step.name, open)
		}
		repaired := n.repair(t)
		if told := slices.ContainsFunc(repaired, func(what string) bool { return strings.Contains(what, "inet firewalld filter_FORWARD") }); told != step.lost {
			t.Errorf("%s: repaired %q, want firewalld's chain: %t", step.name, repaired, step.lost)
		}
		for _, addr := range out {
			if err := test.DialErr(t, client.ns, addr); err != nil {
				t.Errorf("%s: an allocation to the world, %s: %v", step.name, addr, err)
			}
		}
		if again := n.repair(t); len(again) > 0 {
			t.Errorf("%s: a second time: repaired %q", step.name, again)
		}
	}
}
