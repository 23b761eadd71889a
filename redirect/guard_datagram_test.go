// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// cast sends a datagram from the remote to what need not be the allocation's own
// address, by the allocation's veth.
func (a *alloc) cast(to netip.AddrPort) {
	t := a.node.t
	t.Helper()
	var err error
	a.node.remote.Do(func() {
		var veth netlink.Link
		if veth, err = netlink.LinkByName(fmt.Sprintf("veth%d", a.number)); err != nil {
			return
		}
		family := unix.AF_INET
		if to.Addr().Is6() {
			family = unix.AF_INET6
		}
		var fd int
		if fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return
		}
		defer unix.Close(fd)
		err = errors.Join(unix.BindToDevice(fd, veth.Attrs().Name), unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1),
			unix.Sendto(fd, []byte("cast"), 0, sockaddr(fd, to)))
	})
	if err != nil {
		t.Fatalf("send to %s: %v", to, err)
	}
}

// linked waits until the remote's end of the allocation's veth is up. Before Linux 6.9 the
// kernel adds the route of IPv6 multicast up to a second after the peer came up.
func (a *alloc) linked() {
	a.node.t.Helper()
	test.Eventually(a.node.t, func() error {
		var state netlink.LinkOperState
		var err error
		a.node.remote.Do(func() {
			var veth netlink.Link
			if veth, err = netlink.LinkByName(fmt.Sprintf("veth%d", a.number)); err == nil {
				state = veth.Attrs().OperState
			}
		})
		if err == nil && state != netlink.OperUp {
			err = fmt.Errorf("it is %s", state)
		}
		return err
	}, "the remote's end of the veth is up")
}

// forge sends a packet from the remote whose source and protocol are as they are
// named; what it carries begins with two ports.
func (a *alloc) forge(protocol byte, source, to netip.Addr, port uint16, headers ...byte) {
	t := a.node.t
	t.Helper()
	carried := make([]byte, 12)
	binary.BigEndian.PutUint16(carried, 4444)
	binary.BigEndian.PutUint16(carried[2:], port)
	binary.BigEndian.PutUint16(carried[4:], uint16(len(carried)))
	if protocol == unix.IPPROTO_UDP {
		binary.BigEndian.PutUint16(carried[6:], checksum6(source, to, protocol, carried))
	}
	next := protocol
	if len(headers) > 0 {
		next, headers[0] = unix.IPPROTO_DSTOPTS, protocol
	}
	packet := []byte{6 << 4, 0, 0, 0, 0, byte(len(headers) + len(carried)), next, 64}
	packet = append(append(append(append(packet, source.AsSlice()...), to.AsSlice()...), headers...), carried...)
	var err error
	a.node.remote.Do(func() {
		var fd int
		if fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
			return
		}
		defer unix.Close(fd)
		err = errors.Join(unix.BindToDevice(fd, fmt.Sprintf("veth%d", a.number)),
			unix.Sendto(fd, packet, 0, sockaddr(fd, netip.AddrPortFrom(to, 0))))
	})
	if err != nil {
		t.Fatalf("forge a packet from %s to %s: %v", source, to, err)
	}
}

func checksum6(source, to netip.Addr, protocol byte, carried []byte) uint16 {
	pseudo := append(append([]byte(nil), source.AsSlice()...), to.AsSlice()...)
	pseudo = append(append(pseudo, 0, 0, 0, byte(len(carried)), 0, 0, 0, protocol), carried...)
	var sum uint32
	for i := 0; i < len(pseudo); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(pseudo[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	if sum == 0xffff {
		return 0xffff
	}
	return ^uint16(sum)
}

// receives reports whether a datagram waits at the socket.
func receives(fd int) bool {
	_, _, err := unix.Recvfrom(fd, make([]byte, 64), unix.MSG_DONTWAIT)
	return err == nil
}

// Of a datagram by broadcast or multicast, and of IPv6 whose source is forged, the
// kernel asks no sk_lookup, or sk_lookup cannot tell: the guard holds them too.
func TestGuardOfDatagramsPastLookup(t *testing.T) {
	for _, guard := range []struct {
		guard   workload.Guard
		verdict bpfmap.Verdict
		refused bool
	}{{workload.GuardOff, bpfmap.GuardAudited, false}, {workload.GuardAudit, bpfmap.GuardAudited, false}, {workload.GuardEnforce, bpfmap.RefusedGuard, true}} {
		t.Run(string(guard.guard), func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add(func(r *workload.Request) { r.Mode = workload.ModeDirect; r.ExcludeInboundPorts = []uint16{7070} })
			if err := n.SetMeshConfig(a.key, workload.MeshConfig{Guard: guard.guard}); err != nil {
				t.Fatal(err)
			}
			four, six := make(map[uint16]int), make(map[uint16]int)
			for _, port := range []uint16{7070, 8080, 40000} {
				four[port] = a.unconnected(unix.AF_INET, int(port))
				six[port] = a.unconnected(unix.AF_INET6, int(port), func(fd int) error {
					return unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1)
				})
			}
			a.linked()
			// The remote knows the way: for a forged source it would not ask for it.
			test.Eventually(t, func() error {
				if a.cast(netip.AddrPortFrom(a.v6, 7070)); !receives(six[7070]) {
					return errors.New("nothing arrives")
				}
				return nil
			}, "a datagram over IPv6")
			link := netip.MustParseAddr("fe80::1234")
			for name, send := range map[string]func(port uint16){
				"subnet's broadcast": func(port uint16) { a.cast(netip.AddrPortFrom(broadcast4(a.number), port)) },
				"limited broadcast":  func(port uint16) { a.cast(netip.MustParseAddrPort(fmt.Sprintf("255.255.255.255:%d", port))) },
				"IPv4 multicast":     func(port uint16) { a.cast(netip.MustParseAddrPort(fmt.Sprintf("224.0.0.1:%d", port))) },
				"IPv6 multicast":     func(port uint16) { a.cast(netip.MustParseAddrPort(fmt.Sprintf("[ff02::1]:%d", port))) },
				"own source":         func(port uint16) { a.forge(unix.IPPROTO_UDP, a.v6, a.v6, port) },
				"no source":          func(port uint16) { a.forge(unix.IPPROTO_UDP, netip.IPv6Unspecified(), a.v6, port) },
				"own source behind more headers": func(port uint16) {
					a.forge(unix.IPPROTO_UDP, a.v6, a.v6, port, 0, 0, 1, 4, 0, 0, 0, 0)
				},
				"multicast from a forged source": func(port uint16) {
					a.forge(unix.IPPROTO_UDP, link, netip.MustParseAddr("ff02::1"), port)
				},
			} {
				t.Run(name, func(t *testing.T) {
					for port, wanted := range map[uint16]bpfmap.Verdict{7070: bpfmap.InboundExcluded, 8080: guard.verdict, 40000: bpfmap.GuardEphemeral} {
						want := map[bpfmap.Verdict]uint64{wanted: 1}
						if guard.guard == workload.GuardOff {
							want = map[bpfmap.Verdict]uint64{}
						}
						verdictsAre(t, a.rose(func() { send(port) }), want)
						if got, want := receives(four[port]) || receives(six[port]), !guard.refused || port != 8080; got != want {
							t.Errorf("a datagram to port %d arrives: %t, want %t", port, got, want)
						}
					}
				})
			}
		})
	}
}

func broadcast4(n int) netip.Addr { return netip.MustParseAddr(fmt.Sprintf("10.9.%d.255", n)) }

// The kernel asks sk_lookup for TCP and UDP alone; what else has ports is held too.
func TestGuardOfOtherProtocols(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) { r.ExcludeInboundPorts = []uint16{7070} })
	for guard, refused := range map[workload.Guard]bpfmap.Verdict{workload.GuardAudit: bpfmap.GuardAudited, workload.GuardEnforce: bpfmap.RefusedGuard} {
		if err := n.SetMeshConfig(a.key, workload.MeshConfig{Guard: guard}); err != nil {
			t.Fatal(err)
		}
		for _, protocol := range []byte{unix.IPPROTO_UDPLITE, unix.IPPROTO_SCTP, unix.IPPROTO_DCCP} {
			for port, want := range map[uint16]bpfmap.Verdict{7070: bpfmap.InboundExcluded, 8080: refused, 40000: bpfmap.GuardEphemeral} {
				verdictsAre(t, a.rose(func() { a.forge(protocol, remote6(a.number), a.v6, port) }), map[bpfmap.Verdict]uint64{want: 1})
			}
		}
	}
}

// What comes from inside is not the guard's, whatever its address.
func TestGuardLeavesDatagramsInsideAlone(t *testing.T) {
	a := guarded(t, workload.GuardEnforce)
	fd, sender := a.unconnected(unix.AF_INET6, 8081), a.unconnected(unix.AF_INET6, 8082)
	verdictsAre(t, a.rose(func() {
		for _, addr := range []netip.Addr{netip.MustParseAddr("127.0.0.1"), a.v4, netip.IPv6Loopback(), a.v6} {
			err := unix.Sendto(sender, []byte("in"), 0, sockaddr(sender, netip.AddrPortFrom(addr, 8081)))
			if err != nil || !receives(fd) {
				t.Errorf("a datagram to %s from inside does not arrive: %v", addr, err)
			}
		}
	}), map[bpfmap.Verdict]uint64{})
	test.Echo(t, a.node.remote, "udp", "[::]:9000")
	verdictsAre(t, a.rose(func() {
		for _, addr := range []netip.Addr{remote4(a.number), remote6(a.number)} {
			if _, err := a.ask("udp", addrPort(addr, 9000)); err != nil {
				t.Errorf("ask %s by UDP: %v", addr, err)
			}
		}
	}), map[bpfmap.Verdict]uint64{bpfmap.UDP: 2})
}

// An echo from outside is answered by the kernel, whatever the guards, and counted by none.
func TestGuardLeavesEchoesAlone(t *testing.T) {
	eachEgress(t, func(t *testing.T, a *alloc, egress workload.Guard) {
		if err := a.node.SetMeshConfig(a.key, workload.MeshConfig{Guard: egress, Egress: egress}); err != nil {
			t.Fatal(err)
		}
		for _, to := range []netip.Addr{a.v4, a.v6} {
			domain, protocol, asks, answers, header := unix.AF_INET, unix.IPPROTO_ICMP, byte(8), byte(0), 20
			if to.Is6() {
				domain, protocol, asks, answers, header = unix.AF_INET6, unix.IPPROTO_ICMPV6, 128, 129, 0
			}
			var fd int
			var err error
			a.node.remote.Do(func() { fd, err = unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, protocol) })
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { unix.Close(fd) })
			request := append([]byte{asks, 0, 0, 0, 0, 1, 0, 1}, marker...)
			if to.Is4() { // of IPv6 the kernel counts the sum
				var sum uint32
				for i := 0; i < len(request); i++ {
					sum += uint32(request[i]) << (8 * (1 - i%2))
				}
				sum = sum&0xffff + sum>>16
				binary.BigEndian.PutUint16(request[2:], ^uint16(sum+sum>>16))
			}
			verdictsAre(t, a.rose(func() {
				test.Eventually(t, func() error {
					if err := unix.Sendto(fd, request, 0, sockaddr(fd, netip.AddrPortFrom(to, 0))); err != nil {
						return err
					}
					packet := make([]byte, 1500)
					for {
						n, _, err := unix.Recvfrom(fd, packet, 0)
						if err != nil {
							return err
						}
						if n > header && packet[header] == answers && bytes.Contains(packet[:n], []byte(marker)) {
							return nil
						}
					}
				}, "an answer of "+to.String())
			}), map[bpfmap.Verdict]uint64{})
		}
	})
}
