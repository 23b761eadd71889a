// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// markedGroup4 is a group of IPv4 with as much of the marker as there is room for.
var markedGroup4 = [4]byte{239, 'w', 'e', 'i'}

// sawTo reports whether one of the packets so far is of IPv4 for that address.
func (s packetCapture) sawTo(addr netip.Addr) (seen bool) {
	frame := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(s.fd, frame, 0)
		if err != nil {
			return seen
		}
		seen = seen || n > 33 && frame[12] == 8 && frame[13] == 0 && bytes.Equal(frame[30:34], addr.AsSlice())
	}
}

// comesTo runs the attack and waits until what it came to is that: the kernel sends some
// of it later.
func (a *alloc) comesTo(t *testing.T, p *test.Process, wire packetCapture, try attack, want attacked) {
	t.Helper()
	before := a.counts()
	got := a.attack(t, p, wire, try)
	if try.absent(got.errno) && try.Way != "tap, vxlan" { // which every kernel of the tests has
		t.Logf("this kernel has none: %s", errnoName(got.errno))
		return
	}
	test.Eventually(t, func() error {
		got.left = wire.sawMarked() || got.left
		got.verdicts = make(map[bpfmap.Verdict]uint64)
		for verdict, n := range a.counts() {
			if n -= before[verdict]; n > 0 {
				got.verdicts[verdict] = n
			}
			if want.verdicts[verdict] > 0 { // the kernel says more by such a device
				got.verdicts[verdict] = min(n, want.verdicts[verdict])
			}
		}
		if want.verdicts == nil { // what is said of such a device beside the attack is not asked for
			got.verdicts = nil
		}
		if got.errno != want.errno || got.left != want.left || !cmp.Equal(want.verdicts, got.verdicts) {
			return fmt.Errorf("ends with %s, seen outside %t, %v; want %s, %t, %v", errnoName(got.errno), got.left, got.verdicts,
				errnoName(want.errno), want.left, want.verdicts)
		}
		return nil
	}, "what "+try.Way+" comes to")
}

// absent reports whether this kernel has no such device.
func (try attack) absent(errno syscall.Errno) bool {
	return errno == unix.EOPNOTSUPP || errno == unix.ENODEV || errno == unix.ENOENT && try.Way != "nat, udp"
}

type counted map[bpfmap.Verdict]uint64

// What the kernel sends for a task with CAP_NET_ADMIN leaves without the guard, is
// counted in audit, and does not leave in enforce, as long as the rules of the namespace
// are there: tunnels, answers to a source that somebody forged, and what a rule of the
// task's own sends elsewhere.
func TestEgressOfTheKernel(t *testing.T) {
	one := map[workload.Guard]counted{workload.GuardAudit: {bpfmap.EgressAudited: 1}, workload.GuardEnforce: {bpfmap.RefusedEgress: 1}}
	ways := []kernelWay{
		{"tun", map[workload.Guard]counted{
			workload.GuardOff:     {bpfmap.RefusedForwarded: 1},
			workload.GuardAudit:   {bpfmap.RefusedForwarded: 1, bpfmap.EgressAudited: 1},
			workload.GuardEnforce: {bpfmap.RefusedForwarded: 1},
		}, 0},
		{"tun, TTL", one, 0},
		{"tun, echo", one, 0},
		{"tun, closed port", one, 0},
		{"tun, SYN", map[workload.Guard]counted{
			workload.GuardOff:     {bpfmap.Inbound: 1},
			workload.GuardAudit:   {bpfmap.Inbound: 1, bpfmap.EgressAudited: 1},
			workload.GuardEnforce: {bpfmap.RefusedEgress: 1},
		}, 0},
		{"tap, vxlan", one, 0},
		{"tap, geneve", one, 0},
		{"tap, gretap", one, 0},
	}
	kernelSends(t, ways)
}

// What a rule of the task's own sends elsewhere than it was judged for.
func TestNATPastTheEgressGuard(t *testing.T) {
	kernelSends(t, []kernelWay{
		{"nat, tcp", map[workload.Guard]counted{
			workload.GuardOff:     {bpfmap.Local: 1},
			workload.GuardAudit:   {bpfmap.Local: 1, bpfmap.EgressAudited: 1},
			workload.GuardEnforce: {bpfmap.Local: 1, bpfmap.RefusedEgress: 1},
		}, unix.ECONNREFUSED},
		{"nat, udp", map[workload.Guard]counted{workload.GuardEnforce: {bpfmap.RefusedEgress: 1}}, unix.EPERM},
	})
}

// A tunnel of IP takes what the guard lets out for its own reason to where nothing lets
// it: the packet of the tunnel is judged, whatever socket the one inside is of.
func TestTunnelsPastTheEgressGuard(t *testing.T) {
	excluded := map[workload.Guard]counted{
		workload.GuardOff:     {},
		workload.GuardAudit:   {bpfmap.PortExcluded: 1, bpfmap.EgressAudited: 1},
		workload.GuardEnforce: {bpfmap.PortExcluded: 1, bpfmap.RefusedEgress: 1},
	}
	kernelSends(t, []kernelWay{{"ipip", excluded, 0}, {"wireguard", excluded, 0}},
		func(r *workload.Request) { r.ExcludeOutboundPorts = []uint16{excludedPort} })
}

// kernelWay is a way with what it counts by the guard, and its errno in enforce.
type kernelWay struct {
	way      string
	counts   map[workload.Guard]counted
	enforced syscall.Errno
}

func kernelSends(t *testing.T, ways []kernelWay, change ...func(*workload.Request)) {
	t.Helper()
	eachEgress(t, func(t *testing.T, a *alloc, egress workload.Guard) {
		a.neighbour(t)
		wire := capturePackets(t, a.node.remote, "veth1")
		p := a.attacker(t)
		for _, tc := range ways {
			t.Run(tc.way, func(t *testing.T) {
				want := attacked{verdicts: tc.counts[egress], left: egress != workload.GuardEnforce}
				if want.verdicts == nil {
					want.verdicts = counted{}
				}
				if egress == workload.GuardEnforce || tc.way == "nat, tcp" { // nobody listens there
					want.errno = tc.enforced
				}
				to := netip.AddrPortFrom(remote4(1), attackPort)
				a.comesTo(t, p, wire, attack{Way: tc.way, To: to, Device: deviceIndex(t, a.NetNS, "eth0")}, want)
			})
		}
	}, change...)
}

// What never meets IP in the namespace is open to a task with CAP_NET_ADMIN: a bridge
// with the device that leads out, a device upon it in a namespace of the task's own, and
// the device itself there. Neither is what the kernel asks the link for: the neighbours of
// an address that the task takes.
func TestWaysBesideTheEgressGuard(t *testing.T) {
	for _, way := range []string{"tap bridged with eth0", "macvlan in a namespace", "eth0 in a namespace", "an address"} {
		t.Run(way, func(t *testing.T) {
			eachEgress(t, func(t *testing.T, a *alloc, _ workload.Guard) {
				a.neighbour(t)
				wire := capturePackets(t, a.node.remote, "veth1")
				to := netip.AddrPortFrom(remote4(1), attackPort)
				a.comesTo(t, a.attacker(t), wire, attack{Way: way, To: to, Device: deviceIndex(t, a.NetNS, "eth0")},
					attacked{left: true})
			})
		})
	}
}

// A socket that is older than the guard is judged by each packet that it sends, but a
// packet socket, whose packets no rule sees, and a raw one whose packets look as if they
// were of a connection. In audit it is not counted.
func TestEgressOfOlderSockets(t *testing.T) {
	a := egressGuarded(t, workload.GuardOff, func(r *workload.Request) { r.ExcludeOutboundPorts = []uint16{excludedPort} })
	a.neighbour(t)
	wire := capturePackets(t, a.node.remote, "veth1")
	for _, port := range []int{9, excludedPort} { // else the remote's errors come to the next send
		test.Echo(t, a.node.remote, "udp", fmt.Sprintf("0.0.0.0:%d", port))
	}
	try := attack{To: netip.AddrPortFrom(remote4(1), 9), Device: deviceIndex(t, a.NetNS, "eth0")}
	open := func(domain, kind, protocol int) (fd int) {
		t.Helper()
		var err error
		a.Do(func() { fd, err = unix.Socket(domain, kind|unix.SOCK_CLOEXEC, protocol) })
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	connected := func(port uint16) int {
		t.Helper()
		fd := open(unix.AF_INET, unix.SOCK_DGRAM, 0)
		if err := unix.Connect(fd, sockaddr(fd, netip.AddrPortFrom(remote4(1), port))); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	udp, excluded := connected(9), connected(excludedPort)
	raw, ping := open(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW), open(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)
	packet := open(unix.AF_PACKET, unix.SOCK_DGRAM, 0)
	for _, egress := range []workload.Guard{workload.GuardOff, workload.GuardAudit, workload.GuardEnforce} {
		if err := a.node.SetMeshConfig(a.key, workload.MeshConfig{Egress: egress}); err != nil {
			t.Fatal(err)
		}
		for name, tc := range map[string]struct {
			send func() error
			open bool
		}{
			"udp":               {func() error { _, err := unix.Write(udp, []byte(marker)); return err }, false},
			"udp, excluded":     {func() error { _, err := unix.Write(excluded, []byte(marker)); return err }, true},
			"raw with a header": {func() error { return unix.Sendto(raw, try.ipPacket(), 0, sockaddr(raw, try.To)) }, false},
			"raw, that begins TCP": {func() error {
				return unix.Sendto(raw, try.tcpPacket(tcpSYN), 0, sockaddr(raw, try.To))
			}, false},
			"raw, like TCP that goes on": {func() error {
				return unix.Sendto(raw, try.tcpPacket(tcpACK), 0, sockaddr(raw, try.To))
			}, true},
			"icmp": {func() error {
				return unix.Sendto(ping, append([]byte{8, 0, 0, 0, 0, 1, 0, 1}, marker...), 0, sockaddr(ping, netip.AddrPortFrom(remote4(1), 0)))
			}, false},
			"packet": {func() error { return try.packet(packet) }, true},
		} {
			t.Run(string(egress)+"/"+name, func(t *testing.T) {
				want := attacked{verdicts: counted{}, left: true}
				if egress == workload.GuardEnforce && !tc.open {
					want = attacked{errno: unix.EPERM, verdicts: counted{bpfmap.RefusedEgress: 1}}
				}
				wire.sawMarked()
				var got attacked
				got.verdicts = a.rose(func() {
					if err := tc.send(); err != nil && !errors.As(err, &got.errno) {
						t.Fatal(err)
					}
				})
				got.left = wire.sawMarked()
				got.ends(t, want)
			})
		}
	}
}

// A task that joins a group makes the kernel report it: the group's address says what
// the task likes.
func TestEgressOfMulticastReports(t *testing.T) {
	eachEgress(t, func(t *testing.T, a *alloc, egress workload.Guard) {
		a.neighbour(t)
		wire := capturePackets(t, a.node.remote, "veth1")
		four := func(fd, device int) error {
			return unix.SetsockoptIPMreqn(fd, unix.SOL_IP, unix.IP_ADD_MEMBERSHIP, &unix.IPMreqn{Multiaddr: markedGroup4, Ifindex: int32(device)})
		}
		six := func(fd, device int) error {
			group := &unix.IPv6Mreq{Interface: uint32(device)}
			copy(group.Multiaddr[copy(group.Multiaddr[:], []byte{0xff, 0x15}):], marker)
			return unix.SetsockoptIPv6Mreq(fd, unix.SOL_IPV6, unix.IPV6_JOIN_GROUP, group)
		}
		for domain, join := range map[int]func(fd, device int) error{unix.AF_INET: four, unix.AF_INET6: six} {
			before := a.counts()
			wire.sawMarked()
			var err error
			device := deviceIndex(t, a.NetNS, "eth0")
			a.Do(func() {
				var fd int
				if fd, err = unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
					t.Cleanup(func() { unix.Close(fd) })
					err = join(fd, device)
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			var left, told bool
			test.Eventually(t, func() error {
				left = wire.sawMarked() || left
				switch now := a.counts(); egress {
				case workload.GuardAudit:
					told = now[bpfmap.EgressAudited] > before[bpfmap.EgressAudited]
				case workload.GuardEnforce:
					told = now[bpfmap.RefusedEgress] > before[bpfmap.RefusedEgress]
				default:
					told = true
				}
				if want := egress != workload.GuardEnforce; left != want || !told {
					return fmt.Errorf("family %d: seen outside %t, counted %t; want %t, true", domain, left, told, want)
				}
				return nil
			}, "the report of a group")
		}
	})
}

// A later subflow of MPTCP is the kernel's, to an address that the peer names, and is
// judged as the connection of the task that has the first: to the proxy, or refused.
func TestMPTCPPastTheEgressGuard(t *testing.T) {
	for mode, decides := range map[workload.Mode]map[workload.Guard]bpfmap.Verdict{
		workload.ModeTransparent: {workload.GuardOff: bpfmap.Redirected, workload.GuardAudit: bpfmap.Redirected, workload.GuardEnforce: bpfmap.Redirected},
		workload.ModeDirect:      {workload.GuardOff: bpfmap.Direct, workload.GuardAudit: bpfmap.EgressAudited, workload.GuardEnforce: bpfmap.RefusedEgress},
	} {
		for egress, verdict := range decides {
			t.Run(fmt.Sprintf("%s, %s", mode, egress), func(t *testing.T) {
				a := egressGuarded(t, egress, func(r *workload.Request) {
					r.Mode, r.ExcludeOutboundCIDRs = mode, []netip.Prefix{netip.PrefixFrom(remote4(1), 32)}
				})
				second := netip.MustParseAddr("10.9.1.77")
				for ns, lines := range map[*test.NetNS][]string{
					a.NetNS:       {"mptcp limits set subflows 8 add_addr_accepted 8"},
					a.node.remote: {"addr add 10.9.1.77/24 dev veth1", "mptcp limits set subflows 8 add_addr_accepted 8", "mptcp endpoint add 10.9.1.77 dev veth1 signal"},
				} {
					for _, line := range lines {
						ipIn(t, ns, line)
					}
				}
				wire := capturePackets(t, a.node.remote, "veth1")
				before := a.counts()
				a.holdMPTCP(t, netip.AddrPortFrom(remote4(1), attackPort))
				test.Eventually(t, func() error {
					if now := a.counts(); now[verdict] == before[verdict] {
						return fmt.Errorf("no %s: %v", verdict, now)
					}
					return nil
				}, "the later subflow")
				if left, want := wire.sawTo(second), verdict == bpfmap.Direct || verdict == bpfmap.EgressAudited; left != want {
					t.Errorf("the subflow is seen outside: %t, want %t", left, want)
				}
			})
		}
	}
}

// holdMPTCP makes a connection to the remote, by which data went both ways: the kernel
// asks for no other subflow before.
func (a *alloc) holdMPTCP(t *testing.T, to netip.AddrPort) {
	t.Helper()
	open := func(ns *test.NetNS) (fd int) {
		t.Helper()
		var err error
		ns.Do(func() { fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP) })
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	listener, task := open(a.node.remote), open(a.NetNS)
	accepted := -1
	for _, step := range []func() error{
		func() error {
			return unix.Bind(listener, sockaddr(listener, netip.AddrPortFrom(netip.IPv4Unspecified(), to.Port())))
		},
		func() error { return unix.Listen(listener, 4) },
		func() error { return unix.Connect(task, sockaddr(task, to)) },
		func() (err error) { accepted, _, err = unix.Accept(listener); return err },
		func() error { t.Cleanup(func() { unix.Close(accepted) }); return nil },
		func() error { _, err := unix.Write(task, []byte("?")); return err },
		func() error { _, err := unix.Read(accepted, make([]byte, 1)); return err },
		func() error { _, err := unix.Write(accepted, []byte("!")); return err },
		func() error { _, err := unix.Read(task, make([]byte, 1)); return err },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
}

func ipIn(t *testing.T, ns *test.NetNS, line string) {
	t.Helper()
	ns.Do(func() {
		if out, err := exec.Command("sh", "-c", "ip "+line).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", line, err, out)
		}
	})
}
