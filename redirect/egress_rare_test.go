// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// eachEgress runs action with an allocation for each mode of the egress guard.
func eachEgress(t *testing.T, action func(t *testing.T, a *alloc, egress workload.Guard), change ...func(*workload.Request)) {
	t.Helper()
	for _, egress := range []workload.Guard{workload.GuardOff, workload.GuardAudit, workload.GuardEnforce} {
		t.Run(string(egress), func(t *testing.T) { action(t, egressGuarded(t, egress, change...), egress) })
	}
}

// attacker is a process that is root of the allocation.
func (a *alloc) attacker(t *testing.T) *test.Process {
	t.Helper()
	return test.Helper(t, test.Spec{NetNS: a.NetNS, Cgroup: a.taskCg}, attackFunc)
}

// ends fails the test unless the attack came to that.
func (got attacked) ends(t *testing.T, want attacked) {
	t.Helper()
	verdictsAre(t, got.verdicts, want.verdicts)
	if got.errno != want.errno || got.left != want.left {
		t.Errorf("ends with %s, seen outside %t; want %s, %t", errnoName(got.errno), got.left, errnoName(want.errno), want.left)
	}
}

// Options of TCP that choose a way lead to the proxy all the same, whatever the guard.
func TestEgressOptionsOfTCP(t *testing.T) {
	eachEgress(t, func(t *testing.T, a *alloc, _ workload.Guard) {
		a.neighbour(t)
		wire := capturePackets(t, a.node.remote, "veth1")
		p := a.attacker(t)
		for _, way := range []string{"tcp SO_DONTROUTE", "tcp IP_UNICAST_IF", "tcp TCP_REPAIR"} {
			for _, to := range []netip.Addr{remote4(1), remote6(1)} {
				t.Run(way+" "+to.String(), func(t *testing.T) {
					a.attack(t, p, wire, attack{Way: way, To: netip.AddrPortFrom(to, attackPort), Device: deviceIndex(t, a.NetNS, "eth0")}).
						ends(t, attacked{verdicts: map[bpfmap.Verdict]uint64{bpfmap.Redirected: 1}})
				})
			}
		}
	})
}

// An own link-local address by another device's scope is somebody else's, and without the
// egress guard is not judged: the one way of TCP that is open, and it needs a second device
// and a host behind it that has taken the address. Anybody else's is as any other address.
func TestEgressByScope(t *testing.T) {
	eachEgress(t, func(t *testing.T, a *alloc, egress workload.Guard) {
		test.Veth(t, test.VethEnd{NetNS: a.NetNS, Name: "eth1"}, test.VethEnd{NetNS: a.node.remote, Name: "second"})
		var own, others netip.Addr
		a.Do(func() { own = linkLocal(t, "eth0") })
		a.node.remote.Do(func() {
			others = linkLocal(t, "veth1")
			second, err := netlink.LinkByName("second")
			if err != nil {
				t.Fatal(err)
			}
			addr := &netlink.Addr{IPNet: netlink.NewIPNet(own.AsSlice()), Flags: unix.IFA_F_NODAD}
			addr.Mask = []byte{255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0}
			if err := netlink.AddrAdd(second, addr); err != nil {
				t.Fatal(err)
			}
		})
		a.Do(func() { linkLocal(t, "eth1") })
		if _, err := a.node.Check(a.key, a.Path); err != nil { // the addresses came after ADD
			t.Fatal(err)
		}
		test.Echo(t, a.node.remote, "tcp", fmt.Sprintf("[::]:%d", attackPort))
		test.Echo(t, a.node.remote, "udp", fmt.Sprintf("[::]:%d", attackPort))
		p := a.attacker(t)
		first, second := capturePackets(t, a.node.remote, "veth1"), capturePackets(t, a.node.remote, "second")
		t.Run("an own address by another device", func(t *testing.T) {
			to := attack{To: netip.AddrPortFrom(own, attackPort), Device: deviceIndex(t, a.NetNS, "eth1")}
			tcp := attacked{verdicts: map[bpfmap.Verdict]uint64{bpfmap.Local: 1}, left: true}
			udp := attacked{verdicts: map[bpfmap.Verdict]uint64{}, left: true}
			switch egress {
			case workload.GuardAudit:
				tcp.verdicts[bpfmap.EgressAudited], udp.verdicts[bpfmap.EgressAudited] = 1, 1
			case workload.GuardEnforce: // the packet, not the call
				tcp = attacked{errno: unix.ECONNREFUSED, verdicts: map[bpfmap.Verdict]uint64{bpfmap.Local: 1, bpfmap.RefusedEgress: 1}}
				udp = attacked{errno: unix.EPERM, verdicts: map[bpfmap.Verdict]uint64{bpfmap.RefusedEgress: 1}}
			}
			to.Way = "tcp by a scope"
			a.attack(t, p, second, to).ends(t, tcp)
			to.Way = "udp by a scope"
			a.attack(t, p, second, to).ends(t, udp)
		})
		t.Run("another's address", func(t *testing.T) {
			to := attack{To: netip.AddrPortFrom(others, attackPort), Device: deviceIndex(t, a.NetNS, "eth0")}
			to.Way = "tcp by a scope"
			a.attack(t, p, first, to).ends(t, attacked{verdicts: map[bpfmap.Verdict]uint64{bpfmap.Redirected: 1}})
			to.Way = "udp by a scope"
			want := attacked{verdicts: map[bpfmap.Verdict]uint64{}, left: true}
			switch egress {
			case workload.GuardAudit:
				want.verdicts[bpfmap.EgressAudited] = 1
			case workload.GuardEnforce:
				want = attacked{errno: unix.ENETUNREACH, verdicts: map[bpfmap.Verdict]uint64{bpfmap.RefusedEgress: 1}}
			}
			a.attack(t, p, first, to).ends(t, want)
		})
	})
}

// linkLocal waits for the device of the calling thread's namespace to have one.
func linkLocal(t *testing.T, device string) (found netip.Addr) {
	t.Helper()
	link, err := netlink.LinkByName(device)
	if err != nil {
		t.Fatal(err)
	}
	for !found.IsValid() {
		list, err := netlink.AddrList(link, netlink.FAMILY_V6)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) { // they change while it reads
			t.Fatal(err)
		}
		for _, addr := range list {
			if ip, _ := netip.AddrFromSlice(addr.IP); ip.IsLinkLocalUnicast() && addr.Flags&unix.IFA_F_TENTATIVE == 0 {
				found = ip
			}
		}
	}
	return found
}

// A socket belongs to the namespace that it was made in, whoever sends by it: what one
// who may enter another namespace makes there, or is passed from there, is not judged.
func TestEgressOfSocketsMadeElsewhere(t *testing.T) {
	eachEgress(t, func(t *testing.T, a *alloc, _ workload.Guard) {
		other := a.node.newAlloc()
		test.Ask(a.node.remote, "tcp", addrPort(other.v4, 9)) //nolint:errcheck // it asks for the way
		wire := capturePackets(t, a.node.remote, "veth2")
		p := a.attacker(t)
		for _, way := range []string{"setns", "passed socket", "fetched socket"} {
			t.Run(way, func(t *testing.T) {
				a.attack(t, p, wire, attack{Way: way, To: netip.AddrPortFrom(other.v4, 9), Elsewhere: a.node.remote.Path}).
					ends(t, attacked{verdicts: map[bpfmap.Verdict]uint64{}, left: true})
			})
		}
	})
}

// A namespace that a task makes, with all rights over it, has no way out: what is sent
// there does not come by the allocation, and nowhere else.
func TestEgressOfNewNamespaces(t *testing.T) {
	eachEgress(t, func(t *testing.T, a *alloc, _ workload.Guard) {
		a.neighbour(t)
		wire := capturePackets(t, a.node.remote, "veth1")
		p := a.attacker(t)
		for _, way := range []string{"udp in new namespaces", "tcp in new namespaces", "raw in new namespaces"} {
			t.Run(way, func(t *testing.T) {
				a.attack(t, p, wire, attack{Way: way, To: netip.AddrPortFrom(remote4(1), attackPort)}).
					ends(t, attacked{errno: unix.ENETUNREACH, verdicts: map[bpfmap.Verdict]uint64{}})
			})
		}
	})
}

// Families that stay on the machine are nobody's business. A Unix socket is reached by its
// file, whatever namespace it was made in: who sees the file has that way.
func TestEgressLeavesWhatStays(t *testing.T) {
	eachEgress(t, func(t *testing.T, a *alloc, _ workload.Guard) {
		path := filepath.Join(t.TempDir(), "socket")
		var listener net.Listener
		var err error
		a.node.remote.Do(func() { listener, err = net.Listen("unix", path) })
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { listener.Close() })
		p := a.attacker(t)
		wire := capturePackets(t, a.node.remote, "veth1")
		for _, way := range []string{"netlink", "key", "alg", "unix"} {
			t.Run(way, func(t *testing.T) {
				got := a.attack(t, p, wire, attack{Way: way, Elsewhere: path})
				if absent(got.errno) {
					t.Logf("this kernel has none: %s", errnoName(got.errno))
					got.errno = 0
				}
				got.ends(t, attacked{verdicts: map[bpfmap.Verdict]uint64{}})
			})
		}
	})
}

// Who moves to the proxy's cgroup has not the proxy's UID, and who has that UID and moves
// to any other cgroup is not the proxy: it takes both.
func TestEgressOfAMovedTask(t *testing.T) {
	eachEgress(t, func(t *testing.T, a *alloc, egress workload.Guard) {
		a.neighbour(t)
		wire := capturePackets(t, a.node.remote, "veth1")
		moved := test.NewCgroup(t)
		for name, to := range map[string]struct {
			uid    uint32
			cgroup *test.Cgroup
		}{"to the proxy's cgroup": {taskUID, a.proxyCg}, "under the proxy's UID": {proxyUID, moved}} {
			t.Run(name, func(t *testing.T) {
				p := test.Helper(t, test.Spec{NetNS: a.NetNS, Cgroup: a.taskCg, UID: to.uid, GID: to.uid}, attackFunc)
				if err := os.WriteFile(filepath.Join(to.cgroup.Path, "cgroup.procs"), []byte(strconv.Itoa(p.PID)), 0); err != nil {
					t.Fatal(err)
				}
				want := attacked{verdicts: map[bpfmap.Verdict]uint64{}, left: true}
				switch egress {
				case workload.GuardAudit:
					want.verdicts[bpfmap.EgressAudited] = 1
				case workload.GuardEnforce:
					want = attacked{errno: unix.ENETUNREACH, verdicts: map[bpfmap.Verdict]uint64{bpfmap.RefusedEgress: 1}}
				}
				a.attack(t, p, wire, attack{Way: "udp", To: netip.AddrPortFrom(remote4(1), 9)}).ends(t, want)
				a.attack(t, p, wire, attack{Way: "tcp SO_DONTROUTE", To: netip.AddrPortFrom(remote4(1), attackPort)}).
					ends(t, attacked{verdicts: map[bpfmap.Verdict]uint64{bpfmap.Redirected: 1}})
			})
		}
	})
}
