// SPDX-License-Identifier: MPL-2.0

package network

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/weirmesh/weir/cni/network/hostport"
	"github.com/weirmesh/weir/cni/network/nft"
	"github.com/weirmesh/weir/test"
)

// mapped is the node with host port 8080 mapped to port 80, as Nomad asks for
// it: for both protocols.
func (n *node) mapped(host, container int) *node {
	mapped := *n
	mapped.config.PortMappings, _ = json.Marshal([]map[string]any{
		{"hostPort": host, "containerPort": container, "protocol": "tcp"},
		{"hostPort": host, "containerPort": container, "protocol": "udp"},
	})
	return &mapped
}

func TestHostPorts(t *testing.T) {
	for name, rules := range map[string]string{"alone": "true", "beside Docker's rules": droppingNodes()["Docker's"]} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			test.Need(t, test.Tool("iptables"))
			n.run(t, "sh", "-ec", rules)
			for _, filtered := range []string{"1", "0"} { // whether the bridge's own frames pass iptables
				n.run(t, "sysctl", "-qw", "net.bridge.bridge-nf-call-iptables="+filtered, "net.bridge.bridge-nf-call-ip6tables="+filtered)
				t.Run("bridge-nf-call-iptables="+filtered, n.testHostPorts)
			}
			n.wantNothingLeft(t)
		})
	}
}

func (n *node) testHostPorts(t *testing.T) {
	m := n.mapped(8080, 80)
	a, _ := m.added(t, "a")
	b, _ := n.added(t, "b")
	servers := map[string]*test.Server{"tcp": test.Echo(t, a.ns, "tcp", ":80"), "udp": test.Echo(t, a.ns, "udp", ":80")}
	for _, ip := range []string{"192.0.2.1", "2001:db8::1"} {
		addr := net.JoinHostPort(ip, "8080")
		for who, ns := range map[string]*test.NetNS{
			"the world": n.outside, "the node": n.ns, "a neighbour": b.ns, "the allocation itself": a.ns,
		} {
			for protocol, server := range servers {
				answer, err := test.Ask(ns, protocol, addr)
				if err != nil || answer.Server != server.Name {
					t.Errorf("%s to %s %s: %+v, %v", who, protocol, addr, answer, err)
				}
				if who == "the world" && answer.Peer.Addr().String() != strings.Replace(strings.Replace(ip, ".1", ".2", 1), "::1", "::2", 1) && err == nil {
					t.Errorf("%s %s: the allocation sees %s, not the world", protocol, addr, answer.Peer)
				}
			}
		}
	}
	if err := test.DialErr(t, n.ns, "127.0.0.1:8080"); err != nil {
		t.Errorf("the node by loopback: %v", err)
	}
}

func TestHostPortsAreCheckedAndRepaired(t *testing.T) {
	n := newNode(t).mapped(8080, 80)
	a, result := n.added(t, "a")
	test.Echo(t, a.ns, "tcp", ":80")
	for name, damage := range map[string][]string{
		"one element":  {"delete", "element", "inet", "weir", "hostports4_any", "{", "tcp", ".", "8080", "}"},
		"the elements": {"flush", "map", "inet", "weir", "hostports4_any"},
		"the chain":    {"flush", "chain", "inet", "weir", "hostports"},
		"a hook":       {"flush", "chain", "inet", "weir", "prerouting"},
		"the table":    {"delete", "table", "inet", "weir"},
		"all":          {"flush", "ruleset"},
	} {
		n.run(t, "nft", damage...)
		if err := test.DialErr(t, n.outside, "192.0.2.1:8080"); err == nil {
			t.Errorf("%s: still reached without it", name)
		}
		repaired, err := n.check(a, nil)
		if err != nil || len(repaired) == 0 {
			t.Fatalf("%s: repaired %q, %v", name, repaired, err)
		}
		if err := test.DialErr(t, n.outside, "192.0.2.1:8080"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		before := n.run(t, "nft", "-s", "list", "ruleset")
		if repaired, err := n.check(a, nil); err != nil || len(repaired) > 0 {
			t.Errorf("%s: second CHECK: repaired %q, %v", name, repaired, err)
		}
		if after := n.run(t, "nft", "-s", "list", "ruleset"); after != before {
			t.Errorf("%s: rules changed:\n%s\nbefore:\n%s", name, after, before)
		}
	}
	rules := n.run(t, "nft", "list", "table", "inet", "weir")
	for _, element := range []string{"tcp . 8080 ", "udp . 8080 "} {
		if strings.Count(rules, element) != 2 { // one a family
			t.Errorf("rules:\n%s\nwant %q twice, to %v", rules, element, addresses(result))
		}
	}
}

// A new namespace for a known ID has the host ports of the old one's job, once.
func TestHostPortsMoveToANewNamespace(t *testing.T) {
	n := newNode(t).mapped(8080, 80)
	n.added(t, "a")
	moved, result := n.added(t, "a")
	test.Echo(t, moved.ns, "tcp", ":80")
	if err := test.DialErr(t, n.outside, "192.0.2.1:8080"); err != nil {
		t.Error(err)
	}
	rules := n.run(t, "nft", "list", "map", "inet", "weir", "hostports4_any")
	if strings.Count(rules, "tcp . 8080 ") != 1 || !strings.Contains(rules, addresses(result)[0]) {
		t.Errorf("rules:\n%s\nwant one for tcp, to %s", rules, addresses(result)[0])
	}
}

// A dead allocation that was never ended does not shadow the ports of the one
// that runs, and its DEL does not take them away.
func TestHostPortsAreTakenOverFromAnEndedAllocation(t *testing.T) {
	n := newNode(t).mapped(8080, 80)
	ended, _ := n.added(t, "ended")
	running, _ := n.added(t, "running")
	server := test.Echo(t, running.ns, "tcp", ":80")
	want := func(when string) {
		t.Helper()
		answer, err := test.Ask(n.outside, "tcp", "192.0.2.1:8080")
		if err != nil || answer.Server != server.Name {
			t.Errorf("%s: %+v, %v", when, answer, err)
		}
	}
	want("both there")
	if repaired, err := n.check(ended, nil); err != nil || len(repaired) > 0 {
		t.Errorf("CHECK of the ended one: repaired %q, %v", repaired, err)
	}
	want("after CHECK of the ended one")
	if err := n.remove(ended); err != nil {
		t.Fatal(err)
	}
	want("after DEL of the ended one")
}

// DEL without a record ends the attachment's own ports, and no other's.
func TestHostPortsGoWithoutARecord(t *testing.T) {
	n := newNode(t).mapped(8080, 80)
	a, _ := n.added(t, "a")
	other := n.mapped(9090, 80)
	b, _ := other.added(t, "b")
	test.Echo(t, b.ns, "tcp", ":80")
	if err := os.Remove(filepath.Join(n.stateDir, "networks", a.Key.String()+".json")); err != nil {
		t.Fatal(err)
	}
	if err := n.remove(a); err != nil {
		t.Fatal(err)
	}
	if rules := n.run(t, "nft", "list", "table", "inet", "weir"); strings.Contains(rules, "8080") {
		t.Errorf("left behind:\n%s", rules)
	}
	if err := test.DialErr(t, n.outside, "192.0.2.1:9090"); err != nil {
		t.Error(err)
	}
}

// A mapping for one address of the node leaves its others alone.
func TestHostPortsOnOneAddress(t *testing.T) {
	n := newNode(t)
	n.run(t, "ip", "address", "add", "192.0.2.3/24", "dev", "uplink")
	n.run(t, "ip", "-6", "address", "add", "2001:db8::3/64", "dev", "uplink", "nodad")
	one := *n
	one.config.PortMappings = json.RawMessage(`[
		{"hostPort": 8080, "containerPort": 80, "protocol": "TCP", "hostIP": "192.0.2.3"},
		{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "2001:db8::3"},
		{"hostPort": 8081, "containerPort": 80, "protocol": "tcp", "hostIP": "0.0.0.0"},
		{"hostPort": 8082, "containerPort": 80, "protocol": "tcp", "hostIP": "::"}]`)
	a, _ := one.added(t, "a")
	test.Echo(t, a.ns, "tcp", ":80")
	for address, reached := range map[string]bool{
		"192.0.2.3:8080": true, "192.0.2.1:8080": false, "[2001:db8::3]:8080": true, "[2001:db8::1]:8080": false,
		"192.0.2.1:8081": true, "192.0.2.3:8081": true, "[2001:db8::1]:8081": false,
		"[2001:db8::1]:8082": true, "192.0.2.1:8082": false,
	} {
		if err := test.DialErr(t, n.outside, address); (err == nil) != reached {
			t.Errorf("%s: %v: want reached %v", address, err, reached)
		}
	}
}

// The node's own way by loopback, in both families, opens no way for others.
func TestHostPortsByLoopback(t *testing.T) {
	n := newNode(t).mapped(8080, 80)
	a, built := n.added(t, "a")
	server := test.Echo(t, a.ns, "tcp", ":80")
	// Where the bridge's own frames pass ip6tables the answer to ::1 is
	// translated too early, and the kernel drops it: a named limit.
	n.run(t, "sysctl", "-qw", "net.bridge.bridge-nf-call-ip6tables=0")
	for _, address := range []string{"127.0.0.1:8080", "127.1.2.3:8080", "[::1]:8080"} {
		answer, err := test.Ask(n.ns, "tcp", address)
		if err != nil || answer.Server != server.Name {
			t.Errorf("the node to %s: %+v, %v", address, answer, err)
		}
	}
	// What listens on the node's loopback only is not for allocations that
	// send such packets over the bridge.
	test.Echo(t, n.ns, "tcp", "127.0.0.1:7070")
	a.ns.Do(func() {
		runHere(t, "sysctl", "-qw", "net.ipv4.conf.eth0.route_localnet=1")
		runHere(t, "ip", "route", "del", "local", "127.0.0.0/8", "dev", "lo", "table", "local")
		runHere(t, "ip", "route", "del", "local", "127.0.0.1", "dev", "lo", "table", "local")
		runHere(t, "ip", "route", "add", "127.0.0.1/32", "via", "10.77.0.1", "src", addresses(built)[0])
	})
	if err := test.DialErr(t, a.ns, "127.0.0.1:7070"); err == nil {
		t.Error("an allocation reached what listens on the node's loopback")
	}
}

// UDP from one socket goes to the allocation that has the port now.
func TestHostPortsForgetFlowsOfUDP(t *testing.T) {
	n := newNode(t).mapped(8080, 80)
	client, err := dialUDP(n.outside, "192.0.2.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for _, id := range []string{"first", "second"} {
		// Sent to nobody: such a flow, too, must not keep to the node.
		_, _ = client.Write([]byte("early"))
		a, _ := n.added(t, id)
		server := test.Echo(t, a.ns, "udp", ":80")
		if err := askUntil(client, server.Name); err != nil {
			t.Errorf("%s: %v", id, err)
		}
		if err := n.remove(a); err != nil {
			t.Fatal(err)
		}
	}
}

// A DEL that has read its record before another allocation took its port over leaves that
// one its port.
func TestHostPortIsTakenOverInTheMiddleOfDEL(t *testing.T) {
	n := newNode(t).mapped(8080, 80)
	a, _ := n.added(t, "a")
	ending, err := n.network().records.Read(a.Key)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := n.added(t, "b")
	server := test.Echo(t, b.ns, "tcp", ":80")
	n.ns.Do(func() {
		if err := n.network().teardown(ending); err != nil {
			t.Error(err)
		}
	})
	if answer, err := test.Ask(n.outside, "tcp", "192.0.2.1:8080"); err != nil || answer.Server != server.Name {
		t.Errorf("%+v, %v: want an answer of %s", answer, err, server.Name)
	}
}

// What portmap mapped for an earlier version is repaired and ended by it.
func TestHostPortsThatPortmapMapped(t *testing.T) {
	n := newNode(t).mapped(8080, 80)
	a, _ := n.added(t, "a")
	test.Echo(t, a.ns, "tcp", ":80")
	n.ns.Do(func() {
		r, err := n.network().records.Read(a.Key)
		if err != nil {
			t.Fatal(err)
		}
		if err := nft.WithNftables(func(conn *nftables.Conn) error { return hostport.DeleteElements(conn, r.Ports) }); err != nil {
			t.Fatal(err)
		}
		r.Mapper, r.Ports = "", nil // as earlier versions wrote it
		if err := hostport.Portmap(t.Context(), r, "ADD"); err != nil {
			t.Fatal(err)
		}
		if err := n.network().records.Write(r); err != nil {
			t.Fatal(err)
		}
	})
	if err := test.DialErr(t, n.outside, "192.0.2.1:8080"); err != nil {
		t.Fatal(err)
	}
	n.run(t, "nft", "flush", "chain", "ip", "cni_hostport", "hostports")
	repaired, err := n.check(a, nil)
	if err != nil || fmt.Sprint(repaired) != "[host ports]" {
		t.Errorf("repaired %q, %v: want the host ports", repaired, err)
	}
	if err := test.DialErr(t, n.outside, "192.0.2.1:8080"); err != nil {
		t.Error(err)
	}
	if err := n.remove(a); err != nil {
		t.Fatal(err)
	}
	n.wantNothingLeft(t)
}

func TestHostPortsThatCannotBe(t *testing.T) {
	n := newNode(t)
	for raw, want := range map[string]string{
		`[{"hostPort": 1, "containerPort": 1, "protocol": "icmp"}]`: `host port 1: protocol "icmp": want tcp, udp or sctp`,
		`[{"hostPort": 1, "containerPort": 1, "hostIP": "node"}]`:   "host port 1: hostIP: ",
		`[{"hostPort": 1}]`:                         "hostPort 1, containerPort 0: want both",
		`[{"containerPort": 1}]`:                    "hostPort 0, containerPort 1: want both",
		`[{"hostPort": 70000, "containerPort": 1}]`: "read portMappings: ",
	} {
		bad := *n
		bad.config.PortMappings = json.RawMessage(raw)
		if _, err := bad.add(bad.allocation(t, "bad")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v: want %q", raw, err, want)
		}
	}
	n.wantNothingLeft(t)
}

// Neither portmap nor nft has to be on the node.
func TestHostPortsNeedNoProgram(t *testing.T) {
	n := newNode(t).mapped(8080, 80)
	a := n.allocation(t, "a")
	a.Path = t.TempDir()
	path := os.Getenv("PATH")
	t.Setenv("PATH", a.Path)
	_, err := n.add(a)
	t.Setenv("PATH", path)
	if err != nil {
		t.Fatal(err)
	}
	test.Echo(t, a.ns, "tcp", ":80")
	if err := test.DialErr(t, n.outside, "192.0.2.1:8080"); err != nil {
		t.Error(err)
	}
	if err := n.remove(a); err != nil {
		t.Error(err)
	}
	n.wantNothingLeft(t)
}

// With nothing to map, no map is made.
func TestNoHostPortsNoMaps(t *testing.T) {
	n := newNode(t)
	n.added(t, "a")
	if rules := n.run(t, "nft", "list", "ruleset"); strings.Contains(rules, "hostports") {
		t.Errorf("rules:\n%s", rules)
	}
}

func dialUDP(ns *test.NetNS, address string) (conn net.Conn, err error) {
	ns.Do(func() { conn, err = net.Dial("udp", address) })
	return conn, err
}

// askUntil asks the echo server by one socket until the named one answers.
func askUntil(conn net.Conn, name string) error {
	var last string
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
		if _, err := conn.Write([]byte("\n")); err != nil {
			last = err.Error()
			continue
		}
		if err := conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			return err
		}
		answer := make([]byte, 1500)
		n, err := conn.Read(answer)
		if err != nil {
			last = err.Error()
			continue
		}
		if last = string(answer[:n]); strings.Contains(last, name) {
			return nil
		}
	}
	return fmt.Errorf("no answer of %s, last %s", name, last)
}
