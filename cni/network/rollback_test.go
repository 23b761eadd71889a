// SPDX-License-Identifier: MPL-2.0

package network

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/cni/network/attachment"
)

// Every step of ADD fails once, in a way that a node can really bring about.
// Nothing of the allocation may be left, and an ADD after the cause is gone,
// in the same namespace, succeeds.
func TestAddThatFailsLeavesNothing(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil  func(*testing.T, *node, *allocation)
		repair string // commands, on the node
		is     error
		part   string
		reused bool // the namespace is spoilt too
	}{
		"the IPAM plugin is missing": {
			spoil: func(_ *testing.T, n *node, _ *allocation) { n.ipam(map[string]any{"type": "no-such-ipam"}) },
			is:    attachment.ErrMissing, part: "no-such-ipam",
		},
		"the IPAM plugin fails": {
			spoil: func(_ *testing.T, n *node, _ *allocation) { n.ranges("10.77.0.0/32") }, part: "take an address",
		},
		"there is no address left": {
			spoil: func(t *testing.T, n *node, _ *allocation) {
				n.ranges("10.99.0.0/30")
				n.added(t, "first")
			},
			part: "/weir has each lease as a file: take a larger subnet",
		},
		"the IPAM plugin gives nothing": {
			spoil: func(t *testing.T, n *node, _ *allocation) { n.fakeIPAM(t, `{"cniVersion":"1.0.0"}`) }, part: "gave none",
		},
		"the IPAM plugin gives nonsense": {
			spoil: func(t *testing.T, n *node, _ *allocation) { n.fakeIPAM(t, `x`) }, part: "take an address",
		},
		"there is no room for a gateway": {
			spoil: func(t *testing.T, n *node, _ *allocation) {
				n.fakeIPAM(t, `{"cniVersion":"1.0.0","ips":[{"address":"10.99.0.1/32"}]}`)
			},
			part: "no gateway",
		},
		"the bridge's name is another device's": {
			spoil:  func(t *testing.T, n *node, _ *allocation) { n.run(t, "ip", "link", "add", bridge, "type", "veth") },
			repair: "ip link del " + bridge, is: attachment.ErrTaken, part: "veth",
		},
		"the bridge has another address": {
			spoil: func(t *testing.T, n *node, _ *allocation) {
				n.run(t, "sh", "-ec", "ip link add "+bridge+" type bridge; ip addr add 10.77.0.77/24 dev "+bridge)
			},
			repair: "ip link del " + bridge, is: attachment.ErrTaken, part: "forceAddress",
		},
		"the bridge's MTU is too small for IPv6": {
			spoil: func(_ *testing.T, n *node, _ *allocation) { n.config.MTU = 1000 }, part: "mtu 1000: IPv6 needs 1280",
		},
		"the rules": {
			spoil: func(t *testing.T, n *node, _ *allocation) {
				n.run(t, "sh", "-ec", "nft add table inet weir; nft 'add chain inet weir postrouting { type filter hook input priority 0; }'; nft add rule inet weir postrouting counter")
			},
			repair: "nft delete table inet weir", is: attachment.ErrTaken, part: "inet weir postrouting",
		},
		"the maps of host ports": {
			spoil: func(t *testing.T, n *node, _ *allocation) {
				n.config.PortMappings = json.RawMessage(`[{"hostPort":8080,"containerPort":80,"protocol":"tcp"}]`)
				n.run(t, "sh", "-ec", "nft add table inet weir; nft 'add chain inet weir prerouting { type filter hook input priority 0; }'; nft add chain inet weir others; nft add rule inet weir others counter")
			},
			repair: "nft delete table inet weir", is: attachment.ErrTaken, part: "maps of host ports in table inet weir",
		},
		"the interface's name is taken": {
			spoil: func(t *testing.T, n *node, a *allocation) {
				a.ns.Do(func() { runHere(t, "ip", "link", "add", "eth0", "type", "bridge") })
			},
			is: attachment.ErrTaken, part: "eth0", reused: true,
		},
		"a route": {
			spoil: func(t *testing.T, n *node, _ *allocation) {
				n.fakeIPAM(t, `{"cniVersion":"1.0.0","ips":[{"address":"10.99.0.2/24"}],"routes":[{"dst":"10.0.0.1/8"}]}`)
			},
			part: "add route",
		},
		"the host ports": {
			spoil: func(_ *testing.T, n *node, _ *allocation) {
				n.config.PortMappings = json.RawMessage(`[{"hostPort":8080,"containerPort":80,"protocol":"tcp"},{"hostPort":0,"containerPort":80,"protocol":"udp"}]`)
			},
			part: "map host ports",
		},
		"the host ports, half way": {
			spoil: func(_ *testing.T, n *node, _ *allocation) {
				n.config.PortMappings = json.RawMessage(`[{"hostPort":8080,"containerPort":80,"protocol":"tcp"},{"hostPort":8081,"containerPort":80,"protocol":"none"}]`)
			},
			part: "map host ports",
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			good := *n
			a := n.allocation(t, "a")
			tt.spoil(t, n, a)
			a.Path = n.path
			n.wantSame(t, func() {
				for range 3 { // as often as Nomad tries
					result, err := n.add(a)
					if err == nil || result != nil || !strings.Contains(err.Error(), tt.part) || tt.is != nil && !errors.Is(err, tt.is) {
						t.Fatalf("result %v, error %v: want one that says %q", result, err, tt.part)
					}
				}
				if !tt.reused {
					a.ns.Do(func() {
						if hasDevice("eth0") {
							t.Error("eth0 is still in the namespace")
						}
					})
				}
			})
			if err := n.remove(a); err != nil && !errors.Is(err, attachment.ErrMissing) && !strings.Contains(name, "host ports") && !strings.Contains(name, "IPAM") {
				t.Errorf("DEL after it: %v", err)
			}
			if tt.reused {
				return
			}
			good.run(t, "sh", "-ec", tt.repair)
			if _, err := good.add(a); err != nil {
				t.Errorf("ADD after the cause is gone: %v", err)
			}
			if err := good.remove(a); err != nil {
				t.Error(err)
			}
		})
	}
}

// An ADD that finds a running allocation and cannot repair it takes nothing from it.
func TestFailedRepeatSparesTheRunningAllocation(t *testing.T) {
	n := newNode(t)
	a, _ := n.added(t, "a")
	n.run(t, "sh", "-ec", "nft flush chain inet weir postrouting; nft delete table inet weir; nft add table inet weir; nft 'add chain inet weir postrouting { type filter hook input priority 0; }'")
	if _, err := n.add(a); err == nil {
		t.Fatal("ADD beside a foreign chain succeeded")
	}
	a.ns.Do(func() {
		if !hasDevice("eth0") {
			t.Error("eth0 is gone")
		}
	})
	if _, err := os.Stat(filepath.Join(n.stateDir, "networks", "a-eth0.json")); err != nil {
		t.Error(err)
	}
	n.run(t, "nft", "delete", "table", "inet", "weir")
}

// A process that was killed half way left a record and whatever it had made.
func TestAddAfterACrash(t *testing.T) {
	n := newNode(t)
	a, _ := n.added(t, "a")
	r, err := n.network().records.Read(a.Key)
	if err != nil {
		t.Fatal(err)
	}
	r.Complete, r.Result = false, nil
	if err := n.network().records.Write(r); err != nil {
		t.Fatal(err)
	}
	if _, err := n.add(a); err != nil {
		t.Fatal(err)
	}
	if repairs, err := n.check(a, nil); err != nil || len(repairs) > 0 {
		t.Errorf("repaired %q, %v", repairs, err)
	}
	leases, _ := filepath.Glob(filepath.Join(n.config.LeaseDir, "weir", "10.77.*"))
	if len(leases) != 1 {
		t.Errorf("leases %q: want one", leases)
	}
}

func TestForceAddressReplacesTheBridges(t *testing.T) {
	n := newNode(t)
	n.config.ForceAddress = true
	n.run(t, "sh", "-ec", "ip link add "+bridge+" type bridge; ip addr add 10.77.0.77/24 dev "+bridge)
	a, _ := n.added(t, "a")
	n.ns.Do(func() {
		link, err := netlink.LinkByName(bridge)
		if err != nil {
			t.Fatal(err)
		}
		addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
		if err != nil || len(addrs) != 1 || addrs[0].IP.String() != "10.77.0.1" {
			t.Errorf("addresses of the bridge %v, %v: want the gateway's alone", addrs, err)
		}
	})
	if repairs, err := n.check(a, nil); err != nil || len(repairs) > 0 {
		t.Errorf("repaired %q, %v", repairs, err)
	}
}
