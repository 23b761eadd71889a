// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/probe"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// egressGuarded is an allocation whose egress guard is as the mesh configuration says,
// with a proxy; `change` edits its request.
func egressGuarded(t *testing.T, egress workload.Guard, change ...func(*workload.Request)) *alloc {
	t.Helper()
	a := newNode(t).newAlloc()
	a.add(change...)
	a.startProxy()
	if err := a.node.SetMeshConfig(a.key, workload.MeshConfig{Egress: egress}); err != nil {
		t.Fatal(err)
	}
	return a
}

// sawMarked reports whether one of the packets so far has an attack's marker, is for the
// attack's port, or is of a protocol of IP that has neither.
func (s packetCapture) sawMarked() (seen bool) {
	frame := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(s.fd, frame, 0)
		if err != nil {
			return seen
		}
		packet := frame[:n]
		other := len(packet) > 23 && packet[12] == 8 && packet[13] == 0 &&
			slices.Contains([]byte{unix.IPPROTO_SCTP, unix.IPPROTO_DCCP, unix.IPPROTO_ESP}, packet[23])
		four := len(packet) > 37 && packet[12] == 8 && (packet[23] == unix.IPPROTO_TCP || packet[23] == unix.IPPROTO_UDP) && binary.BigEndian.Uint16(packet[36:]) == attackPort
		six := len(packet) > 57 && packet[12] == 0x86 && packet[20] == unix.IPPROTO_TCP && binary.BigEndian.Uint16(packet[56:]) == attackPort
		seen = seen || other || four || six || bytes.Contains(packet, []byte(marker)) || bytes.Contains(packet, markedGroup4[:])
	}
}

// attacks runs every way once to the remote and returns, by way, what came of it.
type attacked struct {
	errno    syscall.Errno
	verdicts map[bpfmap.Verdict]uint64
	left     bool // a packet socket on the other side saw it
}

func (a *alloc) attack(t *testing.T, p *test.Process, wire packetCapture, try attack) (got attacked) {
	t.Helper()
	wire.sawMarked()
	got.verdicts = a.rose(func() {
		if err := p.Call(try, &got.errno); err != nil {
			t.Fatalf("%s: %v", try.Way, err)
		}
	})
	got.left = wire.sawMarked()
	return got
}

// neighbour makes the remote's addresses known to the allocation, so that a datagram
// leaves at once.
func (a *alloc) neighbour(t *testing.T) {
	t.Helper()
	test.Echo(t, a.node.remote, "tcp", "[::]:9999")
	for _, addr := range []netip.Addr{remote4(a.number), remote6(a.number)} {
		if _, err := test.Ask(a.node.remote, "tcp", addrPort(addr, 9999)); err != nil {
			t.Fatal(err)
		}
		a.askAs(proxyUID, a.proxyCg, "tcp", addrPort(addr, 9999)) //nolint:errcheck // it asks for the way
	}
}

// socketsOnly are the ways whose socket is refused, or counted, when it is made.
func isSocketWay(way string) bool {
	return slices.Contains(append(familyWays(), "udp-lite", "udp-lite connected", "icmp", "ping socket", "raw udp", "raw tcp", "raw with a header",
		"sctp", "sctp seqpacket", "dccp", "l2tp"), way)
}

// ipv4Ways are those that IPv4 alone has, or that have no address.
func ipv4Ways() []string {
	return append(familyWays(), "udp IP_TRANSPARENT", "udp IP_FREEBIND", "udp broadcast", "raw with a header")
}

// familyWays are those of other families than IP's.
func familyWays() []string {
	return slices.AppendSeq([]string{"packet", "packet without a queue", "packet of AF_INET", "vsock", "xdp", "smc", "tipc", "can"}, maps.Keys(otherFamilies()))
}

// absent reports whether this kernel has no such socket.
func absent(errno syscall.Errno) bool {
	return errno == unix.EPROTONOSUPPORT || errno == unix.EAFNOSUPPORT || errno == unix.ESOCKTNOSUPPORT
}

// Each way past the mesh without TCP, as root of the allocation, with the guard off,
// in audit and in enforce: what the application is told, what is counted, and what a
// packet socket outside of the allocation saw.
func TestEgressWays(t *testing.T) {
	tables := make(map[string]attacked) // with the guard off
	unseen := probe.Families() != nil
	for _, egress := range []workload.Guard{workload.GuardOff, workload.GuardAudit, workload.GuardEnforce} {
		a := egressGuarded(t, egress)
		setSysctlIn(t, a.NetNS, "ipv4/ping_group_range", "0 2147483647")
		a.neighbour(t)
		wire := capturePackets(t, a.node.remote, "veth1")
		p := test.Helper(t, test.Spec{NetNS: a.NetNS, Cgroup: a.taskCg}, attackFunc)
		for way := range attackWays() {
			for _, to := range []netip.Addr{remote4(1), remote6(1)} {
				if to.Is6() && slices.Contains(ipv4Ways(), way) {
					continue
				}
				name := fmt.Sprintf("%s by IPv%d", way, map[bool]int{true: 4, false: 6}[to.Is4()])
				t.Run(string(egress)+"/"+name, func(t *testing.T) {
					got := a.attack(t, p, wire, attack{Way: way, To: netip.AddrPortFrom(to, 9), Device: deviceIndex(t, a.NetNS, "eth0")})
					plain := got
					if egress == workload.GuardOff {
						tables[name] = got
					} else {
						plain = tables[name]
					}
					want := plain
					want.verdicts = map[bpfmap.Verdict]uint64{}
					audited, refused := bpfmap.EgressAudited, bpfmap.RefusedEgress
					if isSocketWay(way) {
						audited, refused = bpfmap.EgressSocketAudited, bpfmap.RefusedEgressSocket
					}
					open := unseen && slices.Contains(familyWays(), way)                                       // on such a kernel: see families-open
					inert := open || absent(plain.errno) || plain.errno != 0 && strings.HasPrefix(way, "sctp") // fails by itself
					switch {
					case egress == workload.GuardOff && plain.verdicts[bpfmap.UDP] > 0:
						want.verdicts = map[bpfmap.Verdict]uint64{bpfmap.UDP: plain.verdicts[bpfmap.UDP]} // of connect
					case egress == workload.GuardAudit && !inert:
						want.verdicts = map[bpfmap.Verdict]uint64{audited: 1}
						if way == "udp-lite" { // and what it sends
							want.verdicts[bpfmap.EgressAudited] = 1
						}
					case egress == workload.GuardEnforce && !inert:
						want = attacked{errno: unix.ENETUNREACH, verdicts: map[bpfmap.Verdict]uint64{refused: 1}}
						if isSocketWay(way) {
							want.errno = unix.EPERM
						}
					}
					if most := want.verdicts[audited]; most > 0 { // a former way's socket may send once more
						got.verdicts[audited] = min(got.verdicts[audited], most)
					}
					delete(got.verdicts, bpfmap.UDP) // a connect to loopback beside it
					delete(want.verdicts, bpfmap.UDP)
					if inert && (absent(got.errno) || got.errno == unix.EPERM) && !got.left {
						return // of a protocol that this kernel has not, nothing need be counted
					}
					verdictsAre(t, got.verdicts, want.verdicts)
					if got.errno != want.errno || got.left != want.left {
						t.Errorf("ends with %s, seen outside %t; want %s, %t", errnoName(got.errno), got.left, errnoName(want.errno), want.left)
					}
				})
			}
		}
	}
	if report := os.Getenv("WEIR_EGRESS_REPORT"); report != "" {
		for way, off := range tables {
			t.Logf("%-40s off: %s, left %t", way, errnoName(off.errno), off.left)
		}
	}
	for _, way := range []string{"udp by IPv4", "udp by IPv6", "udp-lite by IPv4", "raw with a header by IPv4", "packet by IPv4", "packet without a queue by IPv4", "icmp by IPv6", "ping socket by IPv4"} {
		if off := tables[way]; !absent(off.errno) && (off.errno != 0 || !off.left) { // Linux 7.1 has no UDP-Lite any more
			t.Errorf("%s ends with %s without the guard, seen outside %t; the test proves nothing", way, errnoName(off.errno), off.left)
		}
	}
}

// What the guard lets out, each for its own reason.
func TestEgressLetsOut(t *testing.T) {
	for _, egress := range []workload.Guard{workload.GuardAudit, workload.GuardEnforce} {
		t.Run(string(egress), func(t *testing.T) {
			a := egressGuarded(t, egress, func(r *workload.Request) {
				r.ExcludeOutboundPorts = []uint16{123}
				r.ExcludeOutboundCIDRs = []netip.Prefix{netip.PrefixFrom(remote6(1), 128)}
				r.ExcludeUIDs = []uint32{1234}
				r.ExcludeInboundPorts = []uint16{7070}
				r.DNS = workload.DNS{Address: remote4(1), Port: 8600}
			})
			for _, port := range []uint16{123, 5353, 8600} {
				test.Echo(t, a.node.remote, "udp", fmt.Sprintf("[::]:%d", port))
			}
			a.serve(taskUID, a.taskCg, "udp", "[::]:7070")
			a.serve(taskUID, a.taskCg, "udp", "127.0.0.1:9000")
			a.serve(taskUID, a.taskCg, "udp", fmt.Sprintf("%s:9000", a.v4))
			other := map[bool]bpfmap.Verdict{true: bpfmap.RefusedEgress, false: bpfmap.EgressAudited}[egress == workload.GuardEnforce]
			for _, tc := range []struct {
				name string
				uid  uint32
				cg   *test.Cgroup
				to   string
				want bpfmap.Verdict
			}{
				{"the proxy", proxyUID, a.proxyCg, addrPort(remote4(1), 5353), bpfmap.UDP},
				{"the proxy's UID in another cgroup", proxyUID, a.taskCg, addrPort(remote4(1), 5353), other},
				{"an excluded port", taskUID, a.taskCg, addrPort(remote4(1), 123), bpfmap.PortExcluded},
				{"an excluded CIDR", taskUID, a.taskCg, addrPort(remote6(1), 5353), bpfmap.CIDRExcluded},
				{"an excluded UID", 1234, a.taskCg, addrPort(remote4(1), 5353), bpfmap.UIDExcluded},
				{"Consul's resolver", taskUID, a.taskCg, addrPort(remote4(1), 53), bpfmap.ToDNS},
				{"Consul's resolver by its own port", taskUID, a.taskCg, addrPort(remote4(1), 8600), bpfmap.UDP},
				{"loopback", taskUID, a.taskCg, "127.0.0.1:9000", bpfmap.UDP},
				{"an own address", taskUID, a.taskCg, addrPort(a.v4, 9000), bpfmap.UDP},
				{"another port", taskUID, a.taskCg, addrPort(remote4(1), 5353), other},
			} {
				t.Run(tc.name, func(t *testing.T) {
					verdictsAre(t, a.rose(func() {
						_, err := a.askAs(tc.uid, tc.cg, "udp", tc.to)
						if refused := tc.want == bpfmap.RefusedEgress; refused != (err != nil) {
							t.Errorf("ask %s: error %v, want one: %t", tc.to, err, refused)
						}
					}), map[bpfmap.Verdict]uint64{tc.want: 1})
				})
			}
			t.Run("an answer", func(t *testing.T) {
				if _, err := test.Ask(a.node.remote, "udp", addrPort(a.v4, 7070)); err != nil {
					t.Errorf("ask an open port from outside: %v", err)
				}
				if _, err := test.Ask(a.node.remote, "udp", addrPort(a.v6, 7070)); err != nil {
					t.Errorf("ask an open port from outside by IPv6: %v", err)
				}
			})
			t.Run("TCP is as it was", func(t *testing.T) {
				a.proxied(t, a.task(t), stream(unix.AF_INET).connect(somewhere).ask(""), somewhere, a.v4)
			})
		})
	}
}

// What came in to a port that the job does not open gets no answer.
func TestEgressOfAnswers(t *testing.T) {
	a := egressGuarded(t, workload.GuardEnforce, func(r *workload.Request) { r.ExcludeInboundPorts = []uint16{7070} })
	for port, want := range map[int]syscall.Errno{7070: 0, 8080: unix.ENETUNREACH} {
		fd, outside := a.unconnected(unix.AF_INET6, port), -1
		a.node.remote.Do(func() { outside, _ = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0) })
		if err := unix.Sendto(outside, []byte("?"), 0, sockaddr(outside, netip.AddrPortFrom(a.v4, uint16(port)))); err != nil {
			t.Fatal(err)
		}
		_, from, err := received(fd, make([]byte, 64))
		if err != nil {
			t.Fatalf("nothing comes in to port %d: %v", port, err)
		}
		if err := unix.Sendto(fd, []byte("!"), 0, from); !isErrno(err, want) {
			t.Errorf("the answer from port %d ends with %v, want %s", port, err, errnoName(want))
		}
		other := *from.(*unix.SockaddrInet6)
		other.Port ^= 1
		if err := unix.Sendto(fd, []byte("!"), 0, &other); !isErrno(err, unix.ENETUNREACH) {
			t.Errorf("a datagram from port %d to who did not ask ends with %v, want ENETUNREACH", port, err)
		}
		unix.Close(outside)
	}
}

func isErrno(err error, want syscall.Errno) bool {
	if want == 0 {
		return err == nil
	}
	return err == want
}

// Weir itself goes on in the namespace: a raw socket of its own would be refused.
func TestEgressLetsWeirLook(t *testing.T) {
	a := egressGuarded(t, workload.GuardEnforce)
	verdictsAre(t, a.rose(func() {
		if repaired, err := a.node.Check(a.key, a.Path); err != nil || len(repaired) > 0 {
			t.Errorf("check: %v, repaired %q", err, repaired)
		}
		if _, err := host.RedirectedByConsul(a.Path); err != nil {
			t.Errorf("look for Consul's rules: %v", err)
		}
	}), map[bpfmap.Verdict]uint64{})
}

// The program for other families is attached with the first egress guard of a node,
// stays, comes along to another version, and goes with the rest.
func TestEgressFamilyProgram(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	if _, err := os.Lstat(n.Paths().Family()); err == nil {
		t.Error("the program is attached without an egress guard")
	}
	if err := n.SetMeshConfig(a.key, workload.MeshConfig{Egress: workload.GuardAudit}); err != nil {
		t.Fatal(err)
	}
	if err := probe.Families(); err != nil {
		t.Logf("this kernel cannot have it: %v", err)
		problemIs(t, a, health.ProblemFamiliesOpen)
		return
	}
	if err := os.Remove(n.Paths().Family()); err != nil {
		t.Fatal(err)
	}
	problemIs(t, a, health.ProblemFamiliesOpen)
	if repaired, err := n.Check(a.key, a.Path); err != nil || !slices.Equal(repaired, []program.Repair{{Kind: program.FamilyHookSet}}) {
		t.Errorf("check: %v, %q", err, repaired)
	}
	hidden := filepath.Join(n.Paths().PinDir, "hidden") // as below a bpffs that another is mounted over
	if err := os.Rename(n.Paths().Family(), hidden); err != nil {
		t.Fatal(err)
	}
	if repaired, err := n.Check(a.key, a.Path); err != nil || !slices.Equal(repaired, []program.Repair{{Kind: program.FamilyHookSet}}) {
		t.Errorf("check with a pin that is hidden: %v, %q", err, repaired)
	}
	a.countsOneSocket(t)
	if err := os.Remove(hidden); err != nil {
		t.Fatal(err)
	}
	a.countsOneSocket(t)
	editControl(t, n.Datapath, func(row *bpfmap.BpfControl) { row.Digest[0]++ })
	if result, err := n.Load(); err != nil || len(result.Problems) > 0 {
		t.Errorf("load over it: %v, %v", err, result.Problems)
	}
	a.countsOneSocket(t)
	if _, err := n.Unload(); err != nil {
		t.Fatal(err)
	}
	if left := files(t, n.Datapath); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// countsOneSocket fails the test unless the program counts a socket of XDP, once.
func (a *alloc) countsOneSocket(t *testing.T) {
	t.Helper()
	p := test.Helper(t, test.Spec{NetNS: a.NetNS, Cgroup: a.taskCg}, attackFunc)
	var errno syscall.Errno
	verdictsAre(t, a.rose(func() {
		if err := p.Call(attack{Way: "xdp", To: netip.AddrPortFrom(remote4(1), 9)}, &errno); err != nil {
			t.Error(err)
		}
	}), map[bpfmap.Verdict]uint64{bpfmap.EgressSocketAudited: 1})
}

// In a plain allocation the guard has TCP, too: what is left are the upstreams.
func TestEgressOfAPlainAllocation(t *testing.T) {
	for egress, want := range map[workload.Guard]bpfmap.Verdict{
		workload.GuardOff: bpfmap.Direct, workload.GuardAudit: bpfmap.EgressAudited, workload.GuardEnforce: bpfmap.RefusedEgress,
	} {
		t.Run(string(egress), func(t *testing.T) {
			a := egressGuarded(t, egress, func(r *workload.Request) { r.Mode = workload.ModeDirect; r.ExcludeOutboundPorts = []uint16{8081} })
			for _, port := range []uint16{8080, 8081} {
				test.Echo(t, a.node.remote, "tcp", fmt.Sprintf("[::]:%d", port))
			}
			a.serve(proxyUID, a.proxyCg, "tcp", "127.0.0.1:9191")
			p := a.task(t)
			failure := map[bool]syscall.Errno{true: unix.ENETUNREACH}[want == bpfmap.RefusedEgress]
			a.moves(t, map[bpfmap.Verdict]uint64{want: 1}, func() {
				p.run(t, stream(unix.AF_INET).connect(addrPort(remote4(1), 8080)).fails(failure))
			})
			a.moves(t, map[bpfmap.Verdict]uint64{want: 1}, func() {
				p.run(t, stream(unix.AF_INET6).connect(addrPort(remote6(1), 8080)).fails(failure))
			})
			a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.PortExcluded: 1, bpfmap.Local: 1}, func() {
				p.run(t, stream(unix.AF_INET).connect(addrPort(remote4(1), 8081)))
				p.run(t, stream(unix.AF_INET).connect("127.0.0.1:9191"))
			})
			a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.Proxy: 1}, func() {
				a.actor(t, proxyUID, a.proxyCg).run(t, stream(unix.AF_INET).connect(addrPort(remote4(1), 8080)))
			})
		})
	}
}

// problemIs fails the test unless the allocation has this problem.
func problemIs(t *testing.T, a *alloc, code health.ProblemCode) {
	t.Helper()
	list, err := a.node.Workloads()
	if err != nil || len(list) != 1 {
		t.Fatalf("%d workloads, %v", len(list), err)
	}
	if !slices.ContainsFunc(list[0].Problems, func(p health.Problem) bool { return p.Code == code.String() }) {
		t.Errorf("problems %v, want %v among them", list[0].Problems, code)
	}
}
