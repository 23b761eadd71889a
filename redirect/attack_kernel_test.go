// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// beyond is an address that a tunnel leads to, and excludedPort what may be sent there.
const (
	beyond       = "198.51.100.9"
	excludedPort = 123
)

// kernelWays are those by which the kernel sends for a task with CAP_NET_ADMIN in the
// namespace: by a tunnel, by an answer, by a rule that rewrites. The last two take the
// device that leads out to another namespace.
func kernelWays() map[string]func(attack) error {
	return map[string]func(attack) error{
		"tun":                    tunnelled((attack).ipPacket),
		"tun, echo":              tunnelled((attack).forgedEcho),
		"tun, closed port":       tunnelled((attack).forgedDatagram),
		"tun, SYN":               tunnelled((attack).forgedSYN),
		"tun, TTL":               tunnelled((attack).dyingPacket),
		"tap bridged with eth0":  bridged("link set DEVICE master attack1"),
		"tap, vxlan":             bridged("link add attack2 type vxlan id 7 remote TO dstport 4789 dev DEVICE"),
		"tap, geneve":            bridged("link add attack2 type geneve id 7 remote TO"),
		"tap, gretap":            bridged("link add attack2 type gretap remote TO"),
		"ipip":                   routed("link add attack2 type ipip remote TO"),
		"wireguard":              routed("link add attack2 type wireguard", keyed),
		"nat, tcp":               rewritten("tcp", dialled()),
		"nat, udp":               rewritten("udp", sent(unix.SOCK_DGRAM, 0)),
		"macvlan in a namespace": elsewhere("link add attack2 link DEVICE type macvlan"),
		"eth0 in a namespace":    elsewhere("link set DEVICE name attack2"),
		"an address":             markedAddress,
	}
}

// ip runs lines of ip(8) with TO, OWN and DEVICE filled in. EOPNOTSUPP: the kernel has
// no such device.
func (a attack) ip(lines ...string) error {
	device, err := netlink.LinkByIndex(a.Device)
	if err != nil {
		return err
	}
	addrs, err := netlink.AddrList(device, netlink.FAMILY_V4)
	if err != nil || len(addrs) == 0 {
		return fmt.Errorf("read own address: %w", err)
	}
	fill := strings.NewReplacer("TO", a.To.Addr().String(), "OWN", addrs[0].IP.String(), "DEVICE", device.Attrs().Name)
	for _, line := range lines {
		out, err := exec.Command("ip", strings.Fields(fill.Replace(line))...).CombinedOutput()
		for _, none := range []string{"Unknown device type", "not supported", "type not found"} {
			if strings.Contains(string(out), none) {
				return unix.EOPNOTSUPP
			}
		}
		if err != nil {
			return fmt.Errorf("ip %s: %w: %s", line, err, out)
		}
	}
	return nil
}

func setSysctls(values map[string]string) error {
	for path, value := range values {
		if err := os.WriteFile("/proc/sys/net/"+path, []byte(value), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// onTun hands action a device of the namespace whose other end is a file.
func (a attack) onTun(kind uint16, action func(fd int) error) error {
	// A device's own announcements by IPv6 would leave by the tunnel, too.
	if err := setSysctls(map[string]string{"ipv6/conf/default/disable_ipv6": "1", "ipv4/conf/all/rp_filter": "0", "ipv4/conf/default/rp_filter": "0"}); err != nil {
		return err
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("attack0")
	if err != nil {
		return err
	}
	request.SetUint16(kind | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return err
	}
	return action(fd)
}

// tunnelled puts a packet into the namespace by a device of the attacker's own.
func tunnelled(packet func(attack) []byte) func(attack) error {
	return func(a attack) error {
		return a.onTun(unix.IFF_TUN, func(fd int) error {
			if err := setSysctls(map[string]string{"ipv4/ip_forward": "1", "ipv4/conf/attack0/forwarding": "1", "ipv4/icmp_ratelimit": "0"}); err != nil {
				return err
			}
			if err := a.ip("link set attack0 up"); err != nil {
				return err
			}
			_, err := unix.Write(fd, packet(a))
			return err
		})
	}
}

// forged is a packet of IPv4 to an address of the namespace, or to another, that says
// that it is from whom the attack is for.
func (a attack) forged(protocol, ttl byte, to net.IP, payload []byte) []byte {
	packet := make([]byte, 20, 20+len(payload))
	packet[0], packet[8], packet[9] = 0x45, ttl, protocol
	binary.BigEndian.PutUint16(packet[2:], uint16(20+len(payload)))
	copy(packet[12:], a.To.Addr().AsSlice())
	copy(packet[16:], to.To4())
	binary.BigEndian.PutUint16(packet[10:], checksum(packet))
	return append(packet, payload...)
}

func checksum(data []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(data); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(data[i:]))
	}
	if len(data)%2 == 1 {
		sum += uint32(data[len(data)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

func (a attack) own() net.IP {
	device, err := netlink.LinkByIndex(a.Device)
	if err != nil {
		return nil
	}
	if addrs, err := netlink.AddrList(device, netlink.FAMILY_V4); err == nil && len(addrs) > 0 {
		return addrs[0].IP
	}
	return nil
}

func (a attack) forgedEcho() []byte {
	request := append([]byte{8, 0, 0, 0, 0, 1, 0, 1}, marker...)
	binary.BigEndian.PutUint16(request[2:], checksum(request))
	return a.forged(unix.IPPROTO_ICMP, 64, a.own(), request)
}

func datagram(port uint16) []byte {
	udp := append(binary.BigEndian.AppendUint16(nil, 4001), make([]byte, 6)...)
	binary.BigEndian.PutUint16(udp[2:], port)
	binary.BigEndian.PutUint16(udp[4:], uint16(8+len(marker)))
	return append(udp, marker...)
}

func (a attack) forgedDatagram() []byte {
	return a.forged(unix.IPPROTO_UDP, 64, a.own(), datagram(4002))
}

// forgedSYN begins a connection to an own address.
func (a attack) forgedSYN() []byte {
	syn := append(binary.BigEndian.AppendUint16(nil, a.To.Port()), make([]byte, 18)...)
	binary.BigEndian.PutUint16(syn[2:], 4002)
	syn[12], syn[13], syn[14] = 5<<4, 2, 64 // length of the header, SYN, window
	pseudo := slices.Concat(a.To.Addr().AsSlice(), a.own().To4(), []byte{0, unix.IPPROTO_TCP, 0, byte(len(syn))}, syn)
	binary.BigEndian.PutUint16(syn[16:], checksum(pseudo))
	return a.forged(unix.IPPROTO_TCP, 64, a.own(), syn)
}

func (a attack) dyingPacket() []byte {
	return a.forged(unix.IPPROTO_UDP, 1, net.ParseIP(beyond), datagram(4002))
}

// bridged hands a frame from a tap to a bridge, which hands it to a device that leads out.
func bridged(make string) func(attack) error {
	return func(a attack) error {
		return a.onTun(unix.IFF_TAP, func(fd int) error {
			defer func() { _, _ = a.ip("link del attack1"), a.ip("link del attack2") }()
			lines := []string{"link add attack1 type bridge", make, "link set attack0 master attack1"}
			if strings.HasPrefix(make, "link add") {
				lines = append(lines, "link set attack2 master attack1", "link set attack2 up")
			}
			if err := a.ip(append(lines, "link set attack0 up", "link set attack1 up")...); err != nil {
				return err
			}
			// With br_netfilter a bridge would ask the rules of IP; the namespace's root says whether.
			if err := setSysctls(map[string]string{"bridge/bridge-nf-call-iptables": "0"}); err != nil {
				return err
			}
			frame := append([]byte{255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 9}, 8, 0)
			_, err := unix.Write(fd, append(frame, a.ipPacket()...))
			return err
		})
	}
}

// markedAddress takes an address with the marker in it, which the kernel asks the link for.
func markedAddress(a attack) error {
	address := [16]byte{0xfd}
	copy(address[1:], marker)
	return a.ip("addr add " + netip.AddrFrom16(address).String() + "/64 dev DEVICE")
}

// sendBeyond sends what the guard lets out to where a tunnel leads.
func (a attack) sendBeyond() error {
	return socketOf(unix.AF_INET, unix.SOCK_DGRAM, 0, func(fd int) error {
		return unix.Sendto(fd, []byte(marker), 0, &unix.SockaddrInet4{Port: excludedPort, Addr: [4]byte(net.ParseIP(beyond).To4())})
	})
}

// routed sends by a tunnel of IP. It stays until the next attack, for what the kernel
// sends later.
func routed(make string, setUp ...func(attack) error) func(attack) error {
	return func(a attack) error {
		_ = a.ip("link del attack2") // of the attack before
		if err := setSysctls(map[string]string{"ipv6/conf/default/disable_ipv6": "1"}); err != nil {
			return err
		}
		if err := a.ip(make); err != nil {
			return err
		}
		for _, step := range setUp {
			if err := step(a); err != nil {
				return err
			}
		}
		if err := a.ip("link set attack2 up", "route replace "+beyond+" dev attack2"); err != nil {
			return err
		}
		return a.sendBeyond()
	}
}

// keyed gives a device of WireGuard a key and a peer.
func keyed(a attack) error {
	const setDevice, ifName, privateKey, peers, publicKey, endpoint, allowedIPs, family, ipAddr, mask = 1, 2, 3, 8, 1, 4, 9, 1, 2, 3
	genl, err := netlink.GenlFamilyGet("wireguard")
	if err != nil {
		return err
	}
	to := a.To.Addr().As4()
	at := binary.BigEndian.AppendUint16(binary.NativeEndian.AppendUint16(nil, unix.AF_INET), a.To.Port())
	at = append(append(at, to[:]...), make([]byte, 8)...)
	request := nl.NewNetlinkRequest(int(genl.ID), unix.NLM_F_ACK)
	request.AddData(&nl.Genlmsg{Command: setDevice, Version: 1})
	request.AddData(nl.NewRtAttr(ifName, nl.ZeroTerminated("attack2")))
	request.AddData(nl.NewRtAttr(privateKey, append([]byte(marker), make([]byte, 32-len(marker))...)))
	all := nl.NewRtAttr(peers|unix.NLA_F_NESTED, nil)
	peer := all.AddRtAttr(unix.NLA_F_NESTED, nil)
	peer.AddRtAttr(publicKey, append(make([]byte, 31), 9))
	peer.AddRtAttr(endpoint, at)
	address := peer.AddRtAttr(allowedIPs|unix.NLA_F_NESTED, nil).AddRtAttr(unix.NLA_F_NESTED, nil)
	address.AddRtAttr(family, binary.NativeEndian.AppendUint16(nil, unix.AF_INET))
	address.AddRtAttr(ipAddr, net.ParseIP(beyond).To4())
	address.AddRtAttr(mask, []byte{32})
	request.AddData(all)
	_, err = request.Execute(unix.NETLINK_GENERIC, 0)
	return err
}

// rewritten sends to an own address, which a rule of the namespace makes another one.
func rewritten(protocol string, send func(attack) error) func(attack) error {
	return func(a attack) error {
		own := a.own()
		rules := fmt.Sprintf("table ip attack { chain output { type nat hook output priority -100; ip daddr %s %s dport %d dnat to %s; }; }",
			own, protocol, a.To.Port(), a.To.Addr())
		if out, err := exec.Command("nft", rules).CombinedOutput(); err != nil {
			return fmt.Errorf("nft: %w: %s", err, out)
		}
		defer exec.Command("nft", "delete table ip attack").Run() //nolint:errcheck // the namespace ends with the test
		addr, _ := netip.AddrFromSlice(own.To4())
		a.To = netip.AddrPortFrom(addr, a.To.Port())
		return send(a)
	}
}

// elsewhere takes a device to a namespace that the attacker makes, and sends from there.
func elsewhere(makes string) func(attack) error {
	return func(a attack) error {
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // and the thread ends with it
			done <- a.fromInside(makes)
		}()
		return <-done
	}
}

func (a attack) fromInside(makes string) error {
	lines := []string{makes}
	if !strings.HasPrefix(makes, "link add") {
		lines = []string{"link set DEVICE down", makes}
	}
	if err := a.ip(lines...); err != nil {
		return err
	}
	device, err := netlink.LinkByName("attack2")
	if err != nil {
		return err
	}
	outer, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer outer.Close()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	inside, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer inside.Close()
	if err := outer.LinkSetNsFd(device, int(inside.Fd())); err != nil {
		return err
	}
	if device, err = netlink.LinkByName("attack2"); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(device); err != nil {
		return err
	}
	a.Device = device.Attrs().Index
	return socketOf(unix.AF_PACKET, unix.SOCK_DGRAM, 0, a.packet)
}
