// SPDX-License-Identifier: MPL-2.0

package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/cni/network/nft"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

func TestAllocationsReachEachOtherAndTheWorld(t *testing.T) {
	n := newNode(t)
	a, _ := n.added(t, "a")
	b, result := n.added(t, "b")
	for _, ip := range addresses(result) {
		addr := net.JoinHostPort(ip, "80")
		server := test.Echo(t, b.ns, "tcp", addr)
		answer, err := test.Ask(a.ns, "tcp", addr)
		if err != nil || answer.Server != server.Name {
			t.Errorf("a to b, %s: %+v, %v", addr, answer, err)
		}
		if err := test.DialErr(t, n.ns, addr); err != nil {
			t.Errorf("node to b, %s: %v", addr, err)
		}
		if err := test.DialErr(t, b.ns, addr); err != nil {
			t.Errorf("b to itself, %s: %v", addr, err)
		}
	}
	// The world has no route to the allocations: it sees the node.
	for world, node := range map[string]string{"192.0.2.2": "192.0.2.1", "2001:db8::2": "2001:db8::1"} {
		addr := net.JoinHostPort(world, "80")
		test.Echo(t, n.outside, "tcp", addr)
		answer, err := test.Ask(a.ns, "tcp", addr)
		if err != nil || answer.Peer.Addr().String() != node {
			t.Errorf("a to the world, %s: %+v, %v: want to be seen as %s", addr, answer, err, node)
		}
	}
	test.Echo(t, a.ns, "tcp", "127.0.0.1:81") // lo is up
	if err := test.DialErr(t, a.ns, "127.0.0.1:81"); err != nil {
		t.Error(err)
	}
}

func TestAddTwiceIsOnce(t *testing.T) {
	n := newNode(t)
	a, first := n.added(t, "a")
	n.wantSame(t, func() {
		for range 2 {
			again, err := n.add(a)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(first, again); diff != "" {
				t.Errorf("result (-first +again):\n%s", diff)
			}
		}
	})
	if err := n.remove(a); err != nil {
		t.Fatal(err)
	}
	n.wantNothingLeft(t)
	if err := n.remove(a); err != nil {
		t.Errorf("second DEL: %v", err)
	}
}

func TestResult(t *testing.T) {
	n := newNode(t)
	a, result := n.added(t, "a")
	data, err := json.Marshal(result)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	mac := func(name string, ns *test.NetNS) (mac string) {
		ns.Do(func() {
			link, err := netlink.LinkByName(name)
			if err != nil {
				t.Fatal(err)
			}
			mac = link.Attrs().HardwareAddr.String()
		})
		return mac
	}
	want := map[string]any{
		"cniVersion": "1.1.0",
		"interfaces": []any{
			map[string]any{"name": bridge, "mac": mac(bridge, n.ns)},
			map[string]any{"name": attachment.HostDevice(a.Key), "mac": mac(attachment.HostDevice(a.Key), n.ns)},
			map[string]any{"name": "eth0", "mac": mac("eth0", a.ns), "sandbox": a.NetNS},
		},
		"ips": []any{
			map[string]any{"address": "10.77.0.2/24", "gateway": "10.77.0.1", "interface": 2.0},
			map[string]any{"address": "fd77:1::2/64", "gateway": "fd77:1::1", "interface": 2.0},
		},
		"routes": []any{map[string]any{"dst": "0.0.0.0/0", "gw": "10.77.0.1"}, map[string]any{"dst": "::/0", "gw": "fd77:1::1"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("result (-want +got):\n%s", diff)
	}
}

// Whatever is bound or dialled right after ADD finds its address usable.
func TestAddressesAreUsableAtOnce(t *testing.T) {
	n := newNode(t)
	a, _ := n.added(t, "a")
	for name, ns := range map[string]*test.NetNS{bridge: n.ns, "eth0": a.ns} {
		ns.Do(func() {
			link, err := netlink.LinkByName(name)
			if err != nil {
				t.Fatal(err)
			}
			addrs, err := netlink.AddrList(link, netlink.FAMILY_V6)
			if err != nil {
				t.Fatal(err)
			}
			for _, addr := range addrs {
				if addr.IP.IsGlobalUnicast() && addr.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_NODAD) != unix.IFA_F_NODAD {
					t.Errorf("%s of %s: flags %x: want it without duplicate address detection", addr.IPNet, name, addr.Flags)
				}
			}
		})
	}
}

func TestKnownIDWithANewNamespace(t *testing.T) {
	n := newNode(t)
	old, _ := n.added(t, "a")
	moved := n.allocation(t, "a")
	result, err := n.add(moved)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(result.Interfaces[attachment.AtAllocation].Sandbox, moved.NetNS) {
		t.Errorf("sandbox %s: want %s", result.Interfaces[attachment.AtAllocation].Sandbox, moved.NetNS)
	}
	old.ns.Do(func() {
		if hasDevice("eth0") {
			t.Error("the old namespace still has eth0")
		}
	})
	leases, _ := filepath.Glob(filepath.Join(n.config.LeaseDir, "weir", "10.77.*"))
	if len(leases) != 1 {
		t.Errorf("leases %q: want one", leases)
	}
	if _, err := n.check(moved, nil); err != nil {
		t.Error(err)
	}
	if _, err := n.check(old, nil); !errors.Is(err, host.ErrNetNSGone) {
		t.Errorf("CHECK with the old namespace: %v: want ErrNetNSGone", err)
	}
}

// Where Docker restarted the pause container under an allocation, its tasks run on in
// the namespace that they have: it must not be taken from them.
func TestKnownIDWhoseTasksRunInTheOldNamespace(t *testing.T) {
	n := newNode(t)
	old, result := n.added(t, "a")
	task := test.NewClient(t, test.Spec{NetNS: old.ns})
	moved := n.allocation(t, "a")
	refused := func() {
		t.Helper()
		n.wantSame(t, func() {
			if _, err := n.add(moved); !errors.Is(err, attachment.ErrInUse) || !strings.Contains(err.Error(), fmt.Sprint(task.PID)) {
				t.Errorf("ADD with another namespace: %v: want ErrInhabited that names process %d", err, task.PID)
			}
		})
	}
	refused()
	if again, err := n.add(old); err != nil || !slices.Equal(addresses(again), addresses(result)) {
		t.Errorf("ADD with the old namespace: %v, %v: want the same result as before", again, err)
	}
	if err := os.RemoveAll(filepath.Join(n.stateDir, "networks")); err != nil {
		t.Fatal(err)
	}
	refused() // the record is lost, too

	task.Stop()
	if _, err := n.add(moved); err != nil {
		t.Errorf("ADD when the task has ended: %v", err)
	}
}

// A reboot leaves no namespace and no record, but the leases of an operator's
// own directory.
func TestAddAfterAReboot(t *testing.T) {
	n := newNode(t)
	a, _ := n.added(t, "a")
	if err := os.RemoveAll(n.stateDir); err != nil {
		t.Fatal(err)
	}
	n.run(t, "ip", "link", "del", attachment.HostDevice(a.Key))
	n.run(t, "ip", "link", "del", bridge)
	again, _ := n.added(t, "a")
	if err := n.remove(again); err != nil {
		t.Fatal(err)
	}
	n.wantNothingLeft(t)
}

func TestDelWithoutAnything(t *testing.T) {
	n := newNode(t)
	a, _ := n.added(t, "a")
	if err := os.RemoveAll(n.stateDir); err != nil {
		t.Fatal(err)
	}
	a.NetNS = "/nowhere"
	if err := n.remove(a); err != nil {
		t.Fatal(err)
	}
	n.wantNothingLeft(t)
}

func TestDelKeepsForLaterWhatItCouldNotDo(t *testing.T) {
	n := newNode(t)
	n.fakeIPAM(t, `{"cniVersion":"1.0.0","ips":[{"address":"10.77.0.2/24"}]}`)
	a, _ := n.added(t, "a")
	path := a.Path
	a.Path = "/nowhere"
	if err := n.remove(a); !errors.Is(err, attachment.ErrMissing) {
		t.Errorf("DEL without the IPAM plugin: %v: want ErrMissing", err)
	}
	n.ns.Do(func() {
		if hasDevice(attachment.HostDevice(a.Key)) {
			t.Error("the device is still there")
		}
		removed, err := n.network().Collect(nil, path)
		if err != nil || !slices.Equal(removed, []workload.AttachmentID{a.Key}) {
			t.Errorf("collected %v, %v", removed, err)
		}
	})
	n.wantNothingLeft(t)
	a.Path = path
}

func TestCollect(t *testing.T) {
	n := newNode(t)
	keep, _ := n.added(t, "keep")
	gone, _ := n.added(t, "gone")
	lost, _ := n.added(t, "lost")
	for _, file := range []string{"lost-eth0.json"} {
		if err := os.Remove(filepath.Join(n.stateDir, "networks", file)); err != nil {
			t.Fatal(err)
		}
	}
	n.run(t, "ip", "link", "del", attachment.HostDevice(lost.Key)) // its namespace died
	other := *n
	other.config.Name = "other"
	other.config.Bridge = "other0"
	other.ranges("10.78.0.0/24")
	foreign, _ := other.added(t, "foreign")
	n.ns.Do(func() {
		removed, err := n.network().Collect([]workload.AttachmentID{keep.Key}, n.path)
		if err != nil || !slices.Equal(removed, []workload.AttachmentID{gone.Key}) {
			t.Errorf("collected %v, %v: want only %s", removed, err, gone.Key)
		}
	})
	leases, _ := filepath.Glob(filepath.Join(n.config.LeaseDir, "weir", "10.*"))
	if len(leases) != 1 {
		t.Errorf("leases %q: want only that of keep", leases)
	}
	for node, a := range map[*node]*allocation{n: keep, &other: foreign} {
		if repairs, err := node.check(a, nil); err != nil || len(repairs) > 0 {
			t.Errorf("%s: repaired %q, %v: want nothing", a.Key, repairs, err)
		}
	}
}

func TestManyAtOnce(t *testing.T) {
	n := newNode(t)
	count := test.Scale(50)
	allocations := make([]*allocation, count)
	for i := range allocations {
		allocations[i] = n.allocation(t, fmt.Sprintf("many-%d", i))
	}
	each := func(action func(*allocation) error) {
		var wg sync.WaitGroup
		for _, a := range allocations {
			wg.Go(func() {
				if err := action(a); err != nil {
					t.Errorf("%s: %v", a.Key, err)
				}
			})
		}
		wg.Wait()
	}
	each(func(a *allocation) error { _, err := n.add(a); return err })
	rules := strings.Count(n.run(t, "nft", "list", "table", "inet", nft.Table), "masquerade comment")
	if rules != 4 { // two of each subnet
		t.Errorf("%d rules: want 4 for all", rules)
	}
	each(func(a *allocation) error {
		if repairs, err := n.check(a, nil); err != nil || len(repairs) > 0 {
			return fmt.Errorf("CHECK: repaired %q, %w", repairs, err)
		}
		return nil
	})
	each(n.remove)
	n.wantNothingLeft(t)
}

// The kernel stops to listen to routers when it becomes one itself; the node
// must not lose its own way out by that.
func TestForwardingKeepsTheNodesOwnRouter(t *testing.T) {
	n := newNode(t)
	n.run(t, "sh", "-ec", `sysctl -qw net.ipv6.conf.all.forwarding=0 net.ipv6.conf.uplink.accept_ra=1
		ip link add deaf type bridge; sysctl -qw net.ipv6.conf.deaf.accept_ra=1
		ip -6 route del default; ip -6 route add default via 2001:db8::2 dev uplink proto ra`)
	t.Cleanup(func() { n.run(t, "ip", "link", "del", "deaf") })
	n.added(t, "a")
	got := n.run(t, "sysctl", "-n", "net.ipv6.conf.all.forwarding", "net.ipv6.conf.uplink.accept_ra", "net.ipv6.conf.deaf.accept_ra", "net.ipv6.conf.default.accept_ra", "net.ipv6.conf.weir0.accept_ra")
	if got != "1\n2\n1\n1\n0\n" {
		t.Errorf("forwarding, accept_ra of uplink, another device, new ones, the bridge: %q: want 1, 2, 1, 1, 0", got)
	}
}
