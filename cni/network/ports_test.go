// SPDX-License-Identifier: MPL-2.0

package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

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

func TestHostPortsAreCheckedAndMended(t *testing.T) {
	n := newNode(t).mapped(8080, 80)
	a, _ := n.added(t, "a")
	n.run(t, "nft", "flush", "chain", "ip", "cni_hostport", "hostports")
	mended, err := n.check(a, nil)
	if err != nil || fmt.Sprint(mended) != "[host ports]" {
		t.Fatalf("mended %q, %v: want the host ports", mended, err)
	}
	test.Echo(t, a.ns, "tcp", ":80")
	if err := test.DialErr(t, n.outside, "192.0.2.1:8080"); err != nil {
		t.Error(err)
	}
	before := n.run(t, "nft", "-s", "list", "ruleset")
	if mended, err := n.check(a, nil); err != nil || len(mended) > 0 {
		t.Errorf("second CHECK: mended %q, %v", mended, err)
	}
	if after := n.run(t, "nft", "-s", "list", "ruleset"); after != before {
		t.Errorf("rules changed:\n%s\nbefore:\n%s", after, before)
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
	rules := n.run(t, "nft", "list", "chain", "ip", "cni_hostport", "hostports")
	if strings.Count(rules, "tcp dport 8080") != 1 || !strings.Contains(rules, addresses(result)[0]) {
		t.Errorf("rules:\n%s\nwant one for tcp, to %s", rules, addresses(result)[0])
	}
}

func TestHostPortsNeedProgramsBeforeAnythingIsMade(t *testing.T) {
	n := newNode(t).mapped(8080, 80)
	only := t.TempDir()
	a := n.allocation(t, "a")
	a.Path = only
	_, err := n.add(a)
	if !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), "portmap") {
		t.Errorf("without portmap: %v: want ErrMissing that names it", err)
	}
	a.Path = n.path
	path := os.Getenv("PATH")
	t.Setenv("PATH", only)
	_, err = n.add(a)
	t.Setenv("PATH", path)
	if !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), "nft") {
		t.Errorf("without nft: %v: want ErrMissing that names it", err)
	}
	n.wantNothingLeft(t)
	n.ns.Do(func() {
		if hasDevice(bridge) {
			t.Error("the bridge was made")
		}
	})
}

// With nothing to map the plugin is not even looked for.
func TestNoHostPortsNoPortmap(t *testing.T) {
	n := newNode(t)
	only := t.TempDir()
	n.path = only
	n.added(t, "a")
	if rules := n.run(t, "nft", "list", "ruleset"); strings.Contains(rules, "cni_hostport") {
		t.Errorf("rules:\n%s", rules)
	}
}
