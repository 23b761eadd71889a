// SPDX-License-Identifier: MPL-2.0

package network

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// withLink calls action for a device, in its namespace.
func withLink(t *testing.T, ns *test.NetNS, name string, action func(netlink.Link) error) {
	t.Helper()
	ns.Do(func() {
		link, err := netlink.LinkByName(name)
		if err == nil {
			err = action(link)
		}
		if err != nil {
			t.Error(err)
		}
	})
}

// mtuIn is the MTU of a device in the namespace.
func mtuIn(t *testing.T, ns *test.NetNS, name string) (mtu int) {
	t.Helper()
	withLink(t, ns, name, func(link netlink.Link) error {
		mtu = link.Attrs().MTU
		return nil
	})
	return mtu
}

// All devices have the MTU that the configuration names, else the least of
// those by which the node reaches everything.
func TestMTU(t *testing.T) {
	for name, tt := range map[string]struct {
		onNode string
		mtu    int // of the configuration
		want   int
	}{
		"named":                 {"true", 1380, 1380},
		"the node's":            {"ip link set uplink mtu 1420", 0, 1420},
		"of IPv6 alone":         {"ip link set uplink mtu 1410; ip -4 route del default", 0, 1410},
		"the least of two":      {"ip link add wan mtu 1390 type veth peer name lan; ip link set wan up; ip -6 route add default dev wan metric 1", 0, 1390},
		"no route to elsewhere": {"ip -4 route del default; ip -6 route del default", 0, 1500},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.config.MTU = tt.mtu
			n.run(t, "sh", "-ec", tt.onNode)
			a, _ := n.added(t, "a")
			for device, ns := range map[string]*test.NetNS{bridge: n.ns, attachment.HostDevice(a.Key): n.ns, "eth0": a.ns} {
				if got := mtuIn(t, ns, device); got != tt.want {
					t.Errorf("mtu of %s: %d, want %d", device, got, tt.want)
				}
			}
		})
	}
}

func TestCheckSetsTheMTU(t *testing.T) {
	n := newNode(t)
	n.config.MTU = 1380
	a, _ := n.added(t, "a")
	a.ns.Do(func() { runHere(t, "ip", "link", "set", "eth0", "mtu", "1400") })
	repairs, err := n.check(a, nil)
	if err != nil || strings.Join(repairs, "; ") != "mtu of eth0 was 1400" {
		t.Errorf("repaired %q, %v", repairs, err)
	}
	if got := mtuIn(t, a.ns, "eth0"); got != 1380 {
		t.Errorf("mtu of eth0: %d", got)
	}
}

// A port that is isolated reaches the world and no neighbour on the bridge.
func TestIsolatedPorts(t *testing.T) {
	for _, isolated := range []bool{false, true} {
		n := newNode(t)
		n.config.Isolated = isolated
		a, _ := n.added(t, "a")
		b, result := n.added(t, "b")
		addr := netip.AddrPortFrom(netip.MustParseAddr(addresses(result)[0]), 80).String()
		test.Echo(t, b.ns, "tcp", addr)
		if err := test.DialErr(t, a.ns, addr); (err != nil) != isolated {
			t.Errorf("isolated %v: a to its neighbour: %v", isolated, err)
		}
		test.Echo(t, n.outside, "tcp", "192.0.2.2:80")
		if err := test.DialErr(t, a.ns, "192.0.2.2:80"); err != nil {
			t.Errorf("isolated %v: a to the world: %v", isolated, err)
		}
	}
}

func TestPromiscuousBridge(t *testing.T) {
	for _, promiscuous := range []bool{false, true} {
		n := newNode(t)
		n.config.Promiscuous = promiscuous
		n.added(t, "a")
		n.ns.Do(func() {
			link, err := netlink.LinkByName(bridge)
			if err != nil {
				t.Fatal(err)
			}
			if got := link.Attrs().Promisc > 0; got != promiscuous {
				t.Errorf("the bridge is promiscuous: %v, want %v", got, promiscuous)
			}
		})
	}
}

// Of programs there are the plugins of host ports and nft: no iptables, no ip.
func TestNoIptablesIsNeeded(t *testing.T) {
	nft, err := exec.LookPath("nft")
	if err != nil {
		test.Need(t, test.Tool("nft"))
	}
	only := t.TempDir()
	for name, path := range map[string]string{"nft": nft, "portmap": filepath.Join(test.CNIPath(t), "portmap")} {
		if err := os.Symlink(path, filepath.Join(only, name)); err != nil {
			t.Fatal(err)
		}
	}
	for name, n := range map[string]*node{"no host ports": newNode(t), "a host port": newNode(t).mapped(8080, 80)} {
		t.Run(name, func(t *testing.T) {
			n.path = only
			a := n.allocation(t, "a")
			t.Setenv("PATH", only)
			if _, err := n.add(a); err != nil {
				t.Fatal(err)
			}
			if repairs, err := n.check(a, nil); err != nil || len(repairs) > 0 {
				t.Errorf("CHECK: repaired %q, %v", repairs, err)
			}
			if err := n.remove(a); err != nil {
				t.Error(err)
			}
		})
		n.wantNothingLeft(t)
	}
}

// What announces an address goes to each port of the bridge, and an ADD would take the
// longer, the more allocations the node has.
func TestLinkLocalAddressesOnlyWhereThereIsIPv6(t *testing.T) {
	for _, tt := range []struct {
		name   string
		ranges []string
		want   bool
	}{
		{"IPv4", []string{subnet4}, false},
		{"both", []string{subnet4, subnet6}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			n.ranges(tt.ranges...)
			a, _ := n.added(t, "a")
			if got := linkLocal(t, a.ns, "eth0"); got != tt.want {
				t.Errorf("eth0 has a link-local address: %v: want %v", got, tt.want)
			}
			if linkLocal(t, n.ns, attachment.HostDevice(a.Key)) {
				t.Error("the host's end has a link-local address: want none")
			}
			if tt.want {
				return
			}
			// One that an earlier version made has such an address, and keeps it.
			withLink(t, a.ns, "eth0", func(link netlink.Link) error {
				return netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP("fe80::1"), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD})
			})
			if repairs, err := n.check(a, nil); err != nil || len(repairs) > 0 {
				t.Errorf("CHECK: %v, %v: want nothing to repair", repairs, err)
			}
			if !linkLocal(t, a.ns, "eth0") {
				t.Error("CHECK took the link-local address away")
			}
		})
	}
}

func linkLocal(t *testing.T, ns *test.NetNS, device string) (found bool) {
	t.Helper()
	withLink(t, ns, device, func(link netlink.Link) error {
		list, err := netlink.AddrList(link, netlink.FAMILY_V6)
		found = slices.ContainsFunc(list, func(a netlink.Addr) bool { return a.IP.IsLinkLocalUnicast() })
		return err
	})
	return found
}
