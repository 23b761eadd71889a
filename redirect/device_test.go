// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// packetCapture counts what leaves a namespace for addresses that never leave one: it
// looks at the other end of the wire, from the first packet on.
type packetCapture struct{ fd int }

func capturePackets(t *testing.T, ns *test.NetNS, device string) packetCapture {
	t.Helper()
	var s packetCapture
	ns.Do(func() {
		var err error
		if s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(s.fd) })
		all := int(htons(unix.ETH_P_ALL))
		if err := unix.Bind(s.fd, &unix.SockaddrLinklayer{Protocol: uint16(all), Ifindex: deviceIndex(t, ns, device)}); err != nil {
			t.Fatal(err)
		}
	})
	return s
}

func htons(n uint16) uint16 { return n<<8 | n>>8 }

// seen are the addresses in the packets so far, ARP requests included, that are
// loopback's or carry an origin.
func (s packetCapture) seen() (found []netip.Addr) {
	frame := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(s.fd, frame, 0)
		if err != nil {
			return found
		}
		var addr, source netip.Addr
		switch packet := frame[:n]; uint16(packet[12])<<8 | uint16(packet[13]) {
		case unix.ETH_P_IP:
			addr, _ = netip.AddrFromSlice(packet[30:34])
			source, _ = netip.AddrFromSlice(packet[26:30])
		case unix.ETH_P_ARP:
			addr, _ = netip.AddrFromSlice(packet[38:42])
		case unix.ETH_P_IPV6:
			addr, _ = netip.AddrFromSlice(packet[38:54])
			source, _ = netip.AddrFromSlice(packet[22:38])
		}
		for _, one := range []netip.Addr{addr, source} {
			if one.IsLoopback() || workload.EncodedPrefix6.Contains(one) {
				found = append(found, one)
			}
		}
	}
}

// A socket that is bound to a device once it is connected stays where it is: no
// packet of it leaves, and the proxy still answers.
func TestDeviceAfterConnect(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.outbound = a.serve(proxyUID, a.proxyCg, "tcp4", outboundListener)
	six := a.serve(proxyUID, a.proxyCg, "tcp6", "[::1]:15001")
	a.serve(taskUID, a.taskCg, "tcp", "[::]:9000")
	wire := capturePackets(t, n.remote, "veth1")
	p := a.task(t)
	for _, tc := range []struct {
		name   string
		domain int
		dial   string
		server string
	}{
		{"IPv4", unix.AF_INET, somewhere, a.outbound.Name},
		{"mapped", unix.AF_INET6, "[::ffff:192.0.2.77]:8080", ""},
		{"IPv6", unix.AF_INET6, elsewhere6, six.Name},
		{"own address", unix.AF_INET, addrPort(a.v4, 9000), ""},
		{"own IPv6 address", unix.AF_INET6, addrPort(a.v6, 9000), ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := p.last(t, stream(tc.domain).connect(tc.dial).device("eth0").ask(""))
			if tc.server != "" && got.Answer.Server != tc.server {
				t.Errorf("%q answered, want %q", got.Answer.Server, tc.server)
			}
		})
	}
	for _, dial := range []string{"127.0.0.1:9000", "[::1]:9000"} {
		t.Run(dial, func(t *testing.T) {
			domain := unix.AF_INET
			if netip.MustParseAddrPort(dial).Addr().Is6() {
				domain = unix.AF_INET6
			}
			// What comes back is not for that device; that nothing leaves is what counts.
			p.run(t, stream(domain).connect(dial).device("eth0").do(step{Do: "write", Text: "?"}))
		})
	}
	if found := wire.seen(); len(found) > 0 {
		t.Errorf("packets left for %v", found)
	}
}

// Loopback does not lie behind another device.
func TestDeviceBeforeLocal(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	test.Veth(t, test.VethEnd{NetNS: a.NetNS, Name: "eth1", Addrs: []netip.Prefix{netip.MustParsePrefix("10.99.0.2/24"), netip.MustParsePrefix("fd99::2/64")}},
		test.VethEnd{NetNS: n.remote, Name: "second", Addrs: []netip.Prefix{netip.MustParsePrefix("10.99.0.1/24"), netip.MustParsePrefix("fd99::1/64")}})
	a.add()
	a.startProxy()
	app := a.serve(taskUID, a.taskCg, "tcp", "[::]:9000")
	p := a.task(t)
	wire, second := capturePackets(t, n.remote, "veth1"), capturePackets(t, n.remote, "second")
	before := segments(t, n.remote)
	for _, tc := range []struct {
		device, dial string
		want         bpfmap.Verdict
	}{
		{"eth0", "127.0.0.1:9000", bpfmap.RefusedDevice},
		{"eth0", "0.0.0.0:9000", bpfmap.RefusedDevice},
		{"eth1", "127.1.2.3:9000", bpfmap.RefusedDevice},
		{"eth0", "[::1]:9000", bpfmap.RefusedDevice},
		{"eth0", "[::ffff:127.0.0.1]:9000", bpfmap.RefusedDevice},
		{"lo", "127.0.0.1:9000", bpfmap.Local},
		{"lo", "[::1]:9000", bpfmap.Local},
		{"eth0", addrPort(a.v4, 9000), bpfmap.Local},
		{"eth0", addrPort(a.v6, 9000), bpfmap.Local},
	} {
		t.Run(tc.device+" "+tc.dial, func(t *testing.T) {
			domain := unix.AF_INET
			if netip.MustParseAddrPort(tc.dial).Addr().Is6() {
				domain = unix.AF_INET6
			}
			a.moves(t, map[bpfmap.Verdict]uint64{tc.want: 1}, func() {
				s := stream(domain).device(tc.device).connect(tc.dial)
				if tc.want == bpfmap.RefusedDevice {
					p.run(t, s.fails(unix.ENETUNREACH))
				} else if got := p.last(t, s.ask("")).Answer.Server; got != app.Name {
					t.Errorf("%q answered, want %q", got, app.Name)
				}
			})
		})
	}
	// The address of another device: nobody answers, but it does not leave either.
	for _, own := range []netip.Addr{a.v4, a.v6} {
		domain := unix.AF_INET
		if own.Is6() {
			domain = unix.AF_INET6
		}
		p.run(t, stream(domain).device("eth1").to("connectStart", addrPort(own, 9000)).fails(unix.EINPROGRESS))
	}
	if found := append(wire.seen(), second.seen()...); len(found) > 0 {
		t.Errorf("packets left for %v", found)
	}
	if now := segments(t, n.remote); now != before {
		t.Errorf("%d segments reached the remote", now-before)
	}
}

// Outside of transparent mode a device is where the packets go, as without Weir.
func TestDeviceInDirectMode(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) { r.Mode = workload.ModeDirect })
	a.Do(func() {
		routes, err := host.DeviceRoutesIn()
		if err != nil || len(routes) > 0 {
			t.Errorf("routes by devices: %v, %v; want none", routes, err)
		}
	})
	p := a.task(t)
	wire := capturePackets(t, n.remote, "veth1")
	a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.Direct: 1}, func() {
		p.run(t, stream(unix.AF_INET).device("eth0").to("connectStart", "127.0.0.1:9000").fails(unix.EINPROGRESS))
	})
	test.Eventually(t, func() error {
		if len(wire.seen()) == 0 {
			return errors.New("no packet for 127.0.0.1 yet")
		}
		return nil
	}, "the SYN on the wire")
}

// A check puts the routes of a device back, and gives a new device its own.
func TestDeviceRoutesAreRepaired(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	count := func() (found int) {
		a.Do(func() {
			routes, err := host.DeviceRoutesIn()
			if err != nil {
				t.Fatal(err)
			}
			found = len(routes)
		})
		return found
	}
	whole := count()
	if whole != 3 {
		t.Fatalf("%d routes by eth0, want those of loopback and of the encoded IPv6 range", whole)
	}
	a.Do(func() {
		routes, err := host.DeviceRoutesIn()
		if err != nil {
			t.Fatal(err)
		}
		for _, route := range routes {
			if err := netlink.RouteDel(route); err != nil {
				t.Fatal(err)
			}
		}
	})
	if repaired, err := n.Check(a.key, a.Path); err != nil || len(repaired) == 0 || count() != whole {
		t.Errorf("check: %v, %q, %d routes; want %d", err, repaired, count(), whole)
	}
	test.Veth(t, test.VethEnd{NetNS: a.NetNS, Name: "eth1", Addrs: []netip.Prefix{netip.MustParsePrefix("10.99.0.2/24")}},
		test.VethEnd{NetNS: n.remote, Name: "second", Addrs: []netip.Prefix{netip.MustParsePrefix("10.99.0.1/24")}})
	if repaired, err := n.Check(a.key, a.Path); err != nil || len(repaired) == 0 || count() <= 2*whole {
		t.Errorf("check beside a second device: %v, %q, %d routes; want more than %d", err, repaired, count(), 2*whole)
	}
	if repaired, err := n.Check(a.key, a.Path); err != nil || len(repaired) > 0 {
		t.Errorf("second check: %v, %q", err, repaired)
	}
	if err := n.Remove(a.key); err != nil {
		t.Fatal(err)
	}
	if left := count(); left > 0 {
		t.Errorf("%d routes stay after removal", left)
	}
}
