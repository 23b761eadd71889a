// SPDX-License-Identifier: MPL-2.0

package network

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/test"
)

// Every piece of a network that may be lost, how, and what CHECK says of it.
func TestCheckRepairs(t *testing.T) {
	for name, tt := range map[string]struct {
		onNode, inside string // commands; HOST is the node's device
		repaired       string
	}{
		"nothing":           {"", "", ""},
		"IPv4 address":      {"", "ip -4 addr flush dev eth0", "address 10.77.0.2/24"},
		"IPv6 address":      {"", "ip -6 addr flush dev eth0 scope global", "address fd77:1::2/64"},
		"default route":     {"", "ip route del default", "route 0.0.0.0/0 by 10.77.0.1"},
		"route moved":       {"", "ip route replace default via 10.77.0.9", "route 0.0.0.0/0 by 10.77.0.1"},
		"IPv6 route moved":  {"", "ip -6 route replace default via fd77:1::9 dev eth0", "route ::/0 by fd77:1::1"},
		"IPv6 route":        {"", "ip -6 route del default", "route ::/0 by fd77:1::1"},
		"eth0 down":         {"", "ip link set eth0 down", "eth0 was down"},
		"lo down":           {"", "ip link set lo down", "lo was down"},
		"host's end down":   {"ip link set HOST down", "", "was down"},
		"no longer a port":  {"ip link set HOST nomaster", "", "of bridge weir0"},
		"bridge deleted":    {"ip link del weir0", "", "bridge weir0"},
		"bridge down":       {"ip link set weir0 down", "", "weir0 was down"},
		"gateway's address": {"ip -4 addr flush dev weir0", "", "gateway 10.77.0.1/24"},
		"all rules":         {"nft flush ruleset", "", "masquerade"},
		"one rule":          {"nft flush chain inet weir postrouting", "", "masquerade"},
		"forwarding":        {"sysctl -qw net.ipv4.ip_forward=0", "", "ip_forward"},
		"IPv6 forwarding":   {"sysctl -qw net.ipv6.conf.all.forwarding=0", "", "forwarding of IPv6"},
		"pair deleted":      {"ip link del HOST", "", "interface eth0"},
		"Docker came":       {"iptables -P FORWARD DROP", "", "out of weir0 in ip filter FORWARD"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			test.Need(t, test.Tool("iptables"))
			a, result := n.added(t, "a")
			n.run(t, "sh", "-ec", strings.ReplaceAll(tt.onNode, "HOST", attachment.HostDevice(a.Key)))
			a.ns.Do(func() { runHere(t, "sh", "-ec", tt.inside) })
			repairs, err := n.check(a, nil)
			if err != nil {
				t.Fatal(err)
			}
			if said := strings.Join(repairs, "\n"); !strings.Contains(said, tt.repaired) || tt.repaired == "" && said != "" {
				t.Errorf("repaired %q: want %q", said, tt.repaired)
			}
			if again, err := n.check(a, nil); err != nil || len(again) > 0 {
				t.Errorf("second CHECK: repaired %q, %v: want nothing", again, err)
			}
			test.Echo(t, n.outside, "tcp", "192.0.2.2:80")
			test.Echo(t, n.outside, "tcp", "[2001:db8::2]:80")
			for _, addr := range []string{"192.0.2.2:80", "[2001:db8::2]:80"} {
				if err := test.DialErr(t, a.ns, addr); err != nil {
					t.Errorf("a to the world, %s: %v", addr, err)
				}
			}
			addr := net.JoinHostPort(addresses(result)[0], "80")
			test.Echo(t, a.ns, "tcp", addr)
			if err := test.DialErr(t, n.ns, addr); err != nil {
				t.Errorf("node to a: %v", err)
			}
		})
	}
}

func TestCheckTakesALostLeaseAnew(t *testing.T) {
	n := newNode(t)
	a, _ := n.added(t, "a")
	lease := filepath.Join(n.config.LeaseDir, "weir", "10.77.0.2")
	if err := os.RemoveAll(n.config.LeaseDir); err != nil {
		t.Fatal(err)
	}
	repairs, err := n.check(a, nil)
	if err != nil || !strings.Contains(strings.Join(repairs, " "), "10.77.0.2") {
		t.Errorf("repaired %q, %v: want the lease", repairs, err)
	}
	if _, err := os.Stat(lease); err != nil {
		t.Error(err)
	}
}

// What another allocation has by now is told, and the running one lives on.
func TestCheckLeavesALeaseThatAnotherHas(t *testing.T) {
	n := newNode(t)
	a, _ := n.added(t, "a")
	if err := os.RemoveAll(n.config.LeaseDir); err != nil {
		t.Fatal(err)
	}
	n.config.Bridge = "other0" // where the same address does no harm
	n.added(t, "b")
	repairs, err := n.check(a, nil)
	if err != nil || !strings.Contains(strings.Join(repairs, " "), "cannot be had again") {
		t.Errorf("said %q, %v: want to hear of the lease, and no error", repairs, err)
	}
}

func TestCheckRestoresALostRecord(t *testing.T) {
	n := newNode(t)
	a, result := n.added(t, "a")
	if err := os.RemoveAll(n.stateDir); err != nil {
		t.Fatal(err)
	}
	if _, err := n.check(a, nil); !errors.Is(err, store.ErrUnknown) {
		t.Errorf("without a previous result: %v: want ErrUnknown", err)
	}
	repairs, err := n.check(a, result)
	if err != nil || !strings.Contains(strings.Join(repairs, " "), "record") {
		t.Fatalf("repaired %q, %v: want the record", repairs, err)
	}
	if again, err := n.check(a, nil); err != nil || len(again) > 0 {
		t.Errorf("second CHECK: repaired %q, %v: want nothing", again, err)
	}
}

// A namespace that came back empty is not filled: the allocation's processes
// are in another one, and Nomad makes them anew on the error.
func TestCheckOfAnEmptyNamespace(t *testing.T) {
	n := newNode(t)
	a, result := n.added(t, "a")
	empty := *a
	empty.ns = test.NewBareNetNS(t)
	empty.NetNS = empty.ns.Path
	for _, lost := range []bool{false, true} {
		if lost {
			if err := os.RemoveAll(n.stateDir); err != nil {
				t.Fatal(err)
			}
		}
		n.wantSame(t, func() {
			if _, err := n.check(&empty, result); !errors.Is(err, host.ErrNetNSGone) {
				t.Errorf("record lost %v: %v: want ErrNetNSGone", lost, err)
			}
		})
	}
}

func TestHostsOwnNamespaceIsRefused(t *testing.T) {
	n := newNode(t)
	a := n.allocation(t, "a")
	a.NetNS = n.ns.Path // as the plugin of this node has it
	if _, err := n.add(a); !errors.Is(err, host.ErrHostNetNS) {
		t.Errorf("error %v: want ErrHostNetNS", err)
	}
	n.wantNothingLeft(t)
}
