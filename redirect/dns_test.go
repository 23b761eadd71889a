// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/json"
	"errors"
	"net/netip"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

const resolverPort = 8600

// resolver is Consul's: UDP and TCP on one port.
type resolver struct{ udp, tcp *test.Server }

func startResolver(t *testing.T, ns *test.NetNS, port uint16) resolver {
	t.Helper()
	addr := addrPort(netip.IPv6Unspecified(), port)
	return resolver{test.Echo(t, ns, "udp", addr), test.Echo(t, ns, "tcp", addr)}
}

// exchange sends a datagram and returns who received it and who the answer came from.
func (s *sockets) exchange(fd int, to netip.AddrPort) (test.Reply, netip.AddrPort) {
	s.t.Helper()
	s.must(socketCall{Op: "send", FD: fd, Addr: to})
	return s.answer(fd)
}

func (s *sockets) answer(fd int) (reply test.Reply, from netip.AddrPort) {
	s.t.Helper()
	got := s.must(socketCall{Op: "receive", FD: fd})
	if err := json.Unmarshal(got.Data, &reply); err != nil {
		s.t.Fatalf("decode reply: %v", err)
	}
	return reply, got.Addr
}

// answeredBy fails the test unless a datagram to `to` reached `at` and the answer seems
// to come from where it was sent.
func (s *sockets) answeredBy(fd int, to, at netip.AddrPort) {
	s.t.Helper()
	reply, from := s.exchange(fd, to)
	if reply.Local != at {
		s.t.Errorf("datagram to %s arrived at %s, want %s", to, reply.Local, at)
	}
	if from != to {
		s.t.Errorf("answer to a datagram to %s seems to come from %s", to, from)
	}
}

// connected is answeredBy with a connected socket of its own.
func (s *sockets) connected(family int, to, at netip.AddrPort) {
	s.t.Helper()
	fd := s.open(family, unix.SOCK_DGRAM, 0)
	defer s.close(fd)
	s.must(socketCall{Op: "connect", FD: fd, Addr: to})
	if got := s.must(socketCall{Op: "peer", FD: fd}).Addr; got != to {
		s.t.Errorf("getpeername of a socket connected to %s says %s", to, got)
	}
	reply, from := s.exchange(fd, netip.AddrPort{})
	if reply.Local != at || from != to {
		s.t.Errorf("datagram on a socket connected to %s arrived at %s, want %s; answer from %s", to, reply.Local, at, from)
	}
}

func TestDNS(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	consul := startResolver(t, n.remote, resolverPort)
	other := startResolver(t, n.remote, 53)
	excluded := uint32(2000)
	a.add(func(r *workload.Request) {
		r.DNS, r.ExcludeUIDs = workload.DNS{Address: remote4(1), Port: resolverPort}, []uint32{excluded}
	})
	a.startProxy()
	name, actual := netip.AddrPortFrom(remote4(1), 53), netip.AddrPortFrom(remote4(1), resolverPort)
	v6 := netip.AddrPortFrom(remote6(1), 53)
	for who, s := range map[string]*sockets{
		"a task": a.sockets(taskUID, a.taskCg), "the proxy": a.sockets(proxyUID, a.proxyCg), "an excluded UID": a.sockets(excluded, a.taskCg),
	} {
		t.Run(who, func(t *testing.T) {
			s := &sockets{s.Process, t}
			for _, family := range []int{unix.AF_INET, unix.AF_INET6} { // IPv6: the mapped form
				verdictsAre(t, a.rose(func() { s.connected(family, name, actual) }), map[bpfmap.Verdict]uint64{bpfmap.ToDNS: 1})
				fd := s.open(family, unix.SOCK_DGRAM, 0)
				verdictsAre(t, a.rose(func() {
					s.answeredBy(fd, name, actual)
					s.answeredBy(fd, name, actual)
				}), map[bpfmap.Verdict]uint64{bpfmap.ToDNS: 2})
				s.close(fd)
			}
			// Another resolver's datagrams are its own, port 53 or not.
			fd := s.open(unix.AF_INET6, unix.SOCK_DGRAM, 0)
			verdictsAre(t, a.rose(func() {
				s.answeredBy(fd, v6, v6)
				s.answeredBy(fd, actual, actual)
			}), map[bpfmap.Verdict]uint64{})
			s.close(fd)
			verdictsAre(t, a.rose(func() { s.connected(unix.AF_INET6, v6, v6) }), map[bpfmap.Verdict]uint64{bpfmap.UDP: 1})
		})
	}
	for _, uid := range []uint32{taskUID, proxyUID, excluded} {
		cgroup := a.taskCg
		if uid == proxyUID {
			cgroup = a.proxyCg
		}
		for _, network := range []string{"tcp4", "udp4"} {
			want := map[string]*test.Server{"tcp4": consul.tcp, "udp4": consul.udp}[network]
			answer, err := a.askAs(uid, cgroup, network, name.String())
			if err != nil || answer.Server != want.Name || answer.To != name || answer.Local != actual {
				t.Errorf("UID %d asks %s by %s: %+v, error %v, want %s", uid, name, network, answer, err, want.Name)
			}
		}
	}
	// TCP to another resolver is a connection like any other.
	answer, err := a.ask("tcp4", "192.0.2.53:53")
	a.answered(answer, err, netip.MustParseAddrPort("192.0.2.53:53"), a.v4)
	if answer, err := a.askAs(proxyUID, a.proxyCg, "tcp6", v6.String()); err != nil || answer.Server != other.tcp.Name {
		t.Errorf("the proxy asks %s: %+v, error %v", v6, answer, err)
	}
}

// sendmmsg and recvmmsg, and one socket that talks to two servers.
func TestDNSManyDatagrams(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	startResolver(t, n.remote, resolverPort)
	startResolver(t, n.remote, 53)
	a.add(func(r *workload.Request) { r.DNS = workload.DNS{Address: remote4(1), Port: resolverPort} })
	name := netip.AddrPortFrom(remote4(1), 53)
	// The allocation can reach the remote's other addresses without a rule.
	second := netip.MustParseAddr("10.99.0.1")
	n.remote.Do(func() { addAddress(t, second) })
	elsewhere := netip.AddrPortFrom(second, 53)
	s := a.sockets(taskUID, a.taskCg)
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		fd := s.open(family, unix.SOCK_DGRAM, 0)
		to := []netip.AddrPort{name, elsewhere, name, elsewhere, elsewhere, name}
		moved := a.rose(func() { s.must(socketCall{Op: "sendmmsg", FD: fd, Addrs: to}) })
		verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.ToDNS: 3})
		names := make(map[netip.AddrPort]int)
		for _, from := range s.must(socketCall{Op: "recvmmsg", FD: fd, Len: len(to)}).Names {
			names[from]++
		}
		if diff := cmp.Diff(map[netip.AddrPort]int{name: 3, elsewhere: 3}, names, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
			t.Errorf("who answered (-want +got):\n%s", diff)
		}
		// Both questions first, then both answers.
		s.must(socketCall{Op: "send", FD: fd, Addr: name})
		s.must(socketCall{Op: "send", FD: fd, Addr: elsewhere})
		for range 2 {
			reply, from := s.answer(fd)
			if from.Port() != 53 || reply.Local.Addr() != from.Addr() || (reply.Local.Port() == resolverPort) != (from == name) {
				t.Errorf("answer of %s seems to come from %s", reply.Local, from)
			}
		}
		s.close(fd)
	}
}

// addAddress adds an address to lo in the calling thread's namespace.
func addAddress(t *testing.T, addr netip.Addr) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatalf("find lo: %v", err)
	}
	if err := netlink.AddrAdd(lo, &netlink.Addr{IPNet: host.IPNet(netip.PrefixFrom(addr, addr.BitLen()))}); err != nil {
		t.Fatalf("add address %s: %v", addr, err)
	}
}

// A UDP socket may be connected again, elsewhere or nowhere.
func TestDNSReconnect(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	startResolver(t, n.remote, resolverPort)
	startResolver(t, n.remote, 5353)
	a.add(func(r *workload.Request) { r.DNS = workload.DNS{Address: remote4(1), Port: resolverPort} })
	name, actual := netip.AddrPortFrom(remote4(1), 53), netip.AddrPortFrom(remote4(1), resolverPort)
	elsewhere := netip.AddrPortFrom(remote4(1), 5353)
	s := a.sockets(taskUID, a.taskCg)
	fd := s.open(unix.AF_INET, unix.SOCK_DGRAM, 0)
	for _, step := range []struct{ dial, at netip.AddrPort }{{name, actual}, {elsewhere, elsewhere}, {name, actual}, {actual, actual}, {name, actual}} {
		s.must(socketCall{Op: "connect", FD: fd, Addr: step.dial})
		if got := s.must(socketCall{Op: "peer", FD: fd}).Addr; got != step.dial {
			t.Errorf("getpeername of a socket connected again to %s says %s", step.dial, got)
		}
		if reply, from := s.exchange(fd, netip.AddrPort{}); reply.Local != step.at || from != step.dial {
			t.Errorf("datagram on a socket connected again to %s arrived at %s, answer from %s", step.dial, reply.Local, from)
		}
	}
	s.must(socketCall{Op: "disconnect", FD: fd})
	if _, err := s.try(socketCall{Op: "peer", FD: fd}); !errors.Is(err, syscall.ENOTCONN) {
		t.Errorf("getpeername of a disconnected socket: %v, want not connected", err)
	}
	s.answeredBy(fd, elsewhere, elsewhere)
	s.answeredBy(fd, name, actual)
}

func TestDNSIPv6Resolver(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	consul := startResolver(t, n.remote, resolverPort)
	a.add(func(r *workload.Request) { r.DNS = workload.DNS{Address: remote6(1), Port: resolverPort} })
	name, actual := netip.AddrPortFrom(remote6(1), 53), netip.AddrPortFrom(remote6(1), resolverPort)
	s := a.sockets(taskUID, a.taskCg)
	verdictsAre(t, a.rose(func() { s.connected(unix.AF_INET6, name, actual) }), map[bpfmap.Verdict]uint64{bpfmap.ToDNS: 1})
	fd := s.open(unix.AF_INET6, unix.SOCK_DGRAM, 0)
	verdictsAre(t, a.rose(func() { s.answeredBy(fd, name, actual) }), map[bpfmap.Verdict]uint64{bpfmap.ToDNS: 1})
	answer, err := a.ask("tcp6", name.String())
	if err != nil || answer.Server != consul.tcp.Name || answer.To != name {
		t.Errorf("ask %s by TCP: %+v, error %v", name, answer, err)
	}
}

// With a port alone the resolver is the namespace's own 127.0.0.1.
func TestDNSPortOnly(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	local := startResolver(t, a.NetNS, resolverPort)
	startResolver(t, n.remote, 53)
	a.add(func(r *workload.Request) { r.DNS = workload.DNS{Port: resolverPort} })
	loopback := netip.MustParseAddr("127.0.0.1")
	name, actual := netip.AddrPortFrom(loopback, 53), netip.AddrPortFrom(loopback, resolverPort)
	other := netip.AddrPortFrom(remote4(1), 53)
	s := a.sockets(taskUID, a.taskCg)
	s.connected(unix.AF_INET, name, actual)
	s.connected(unix.AF_INET6, name, actual)
	fd := s.open(unix.AF_INET, unix.SOCK_DGRAM, 0)
	verdictsAre(t, a.rose(func() {
		s.answeredBy(fd, name, actual)
		s.answeredBy(fd, other, other)
	}), map[bpfmap.Verdict]uint64{bpfmap.ToDNS: 1})
	answer, err := a.ask("tcp4", name.String())
	if err != nil || answer.Server != local.tcp.Name || answer.To != name {
		t.Errorf("ask %s by TCP: %+v, error %v", name, answer, err)
	}
}

// With an address alone every server's port 53 is the resolver's.
func TestDNSAddressOnly(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	consul := startResolver(t, n.remote, 53)
	startResolver(t, n.remote, 5353)
	a.add(func(r *workload.Request) { r.DNS = workload.DNS{Address: remote4(1)} })
	actual := netip.AddrPortFrom(remote4(1), 53)
	s := a.sockets(taskUID, a.taskCg)
	for _, name := range []netip.AddrPort{actual, netip.MustParseAddrPort("8.8.8.8:53"), netip.MustParseAddrPort("127.0.0.53:53")} {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			verdictsAre(t, a.rose(func() { s.connected(family, name, actual) }), map[bpfmap.Verdict]uint64{bpfmap.ToDNS: 1})
			fd := s.open(family, unix.SOCK_DGRAM, 0)
			verdictsAre(t, a.rose(func() { s.answeredBy(fd, name, actual) }), map[bpfmap.Verdict]uint64{bpfmap.ToDNS: 1})
			s.close(fd)
		}
		answer, err := a.ask("tcp4", name.String())
		if err != nil || answer.Server != consul.tcp.Name || answer.To != name {
			t.Errorf("ask %s by TCP: %+v, error %v", name, answer, err)
		}
	}
	elsewhere := netip.AddrPortFrom(remote4(1), 5353)
	fd := s.open(unix.AF_INET, unix.SOCK_DGRAM, 0)
	s.answeredBy(fd, elsewhere, elsewhere)
	// A native IPv6 server: a connected socket can be sent to an IPv4 resolver, an
	// unconnected datagram cannot.
	six := netip.MustParseAddrPort("[2001:db8::53]:53")
	verdictsAre(t, a.rose(func() { s.connected(unix.AF_INET6, six, actual) }), map[bpfmap.Verdict]uint64{bpfmap.ToDNS: 1})
	fd = s.open(unix.AF_INET6, unix.SOCK_DGRAM, 0)
	verdictsAre(t, a.rose(func() {
		if _, err := s.try(socketCall{Op: "send", FD: fd, Addr: six}); !errors.Is(err, syscall.ENETUNREACH) {
			t.Errorf("send to %s: %v, want network unreachable", six, err)
		}
	}), map[bpfmap.Verdict]uint64{bpfmap.RefusedFamily: 1})
}
