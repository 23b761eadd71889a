// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/test"
)

// attackFunc is the helper process that tries to get a packet out of its namespace
// by one way after another, with system calls and nothing of a runtime in between.
const attackFunc = "redirect.attack"

// attack is one try: by which way, to whom.
type attack struct {
	Way    string
	To     netip.AddrPort
	Device int // index of the device that leads out

	Elsewhere string // path of another namespace
}

// attackPort is what attacks by TCP dial.
const attackPort = 7777

// marker is in each packet that an attack sends, where it may say what.
const marker = "weir-attack"

// ipprotoL2TP is L2TP's number without UDP.
const ipprotoL2TP = 115

func serveAttacks([]string) error {
	return test.Serve(func(a attack) (syscall.Errno, error) {
		ways := attackWays()
		maps.Copy(ways, rareWays())
		maps.Copy(ways, kernelWays())
		way, known := ways[a.Way]
		if !known {
			return 0, fmt.Errorf("unknown way %q", a.Way)
		}
		var errno syscall.Errno
		if err := way(a); err != nil && !errors.As(err, &errno) {
			return 0, err
		}
		return errno, nil
	})
}

// socketOf hands a socket to action and closes it.
func socketOf(domain, kind, protocol int, action func(fd int) error) error {
	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return action(fd)
}

func (a attack) domain() int {
	if a.To.Addr().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func (a attack) send(fd int) error { return unix.Sendto(fd, []byte(marker), 0, sockaddr(fd, a.To)) }

// sent opens a socket, sets it up, and sends a datagram.
func sent(kind, protocol int, setUp ...func(a attack, fd int) error) func(attack) error {
	return func(a attack) error {
		return socketOf(a.domain(), kind, protocol, func(fd int) error {
			for _, step := range setUp {
				if err := step(a, fd); err != nil {
					return err
				}
			}
			return a.send(fd)
		})
	}
}

// connected does the same by connect and write.
func connected(kind, protocol int) func(attack) error {
	return func(a attack) error {
		return socketOf(a.domain(), kind, protocol, func(fd int) error {
			if err := finishConnect(fd, unix.Connect(fd, sockaddr(fd, a.To)), unix.EINTR); err != nil {
				return err
			}
			_, err := unix.Write(fd, []byte(marker))
			return err
		})
	}
}

// attackWays are the ways past the mesh that need a socket other than TCP's.
func attackWays() map[string]func(attack) error {
	option := func(level, name, value int) func(attack, int) error {
		return func(_ attack, fd int) error { return unix.SetsockoptInt(fd, level, name, value) }
	}
	toDevice := func(_ attack, fd int) error { return unix.BindToDevice(fd, "eth0") }
	ways := map[string]func(attack) error{
		"udp":                     sent(unix.SOCK_DGRAM, 0),
		"udp connected":           connected(unix.SOCK_DGRAM, 0),
		"udp bound to a device":   sent(unix.SOCK_DGRAM, 0, toDevice),
		"udp SO_DONTROUTE":        sent(unix.SOCK_DGRAM, 0, option(unix.SOL_SOCKET, unix.SO_DONTROUTE, 1)),
		"udp SO_MARK":             sent(unix.SOCK_DGRAM, 0, option(unix.SOL_SOCKET, unix.SO_MARK, 7)),
		"udp SO_BROADCAST":        sent(unix.SOCK_DGRAM, 0, option(unix.SOL_SOCKET, unix.SO_BROADCAST, 1)),
		"udp AF_UNSPEC and again": udpAgain,
		"udp on a dual-stack socket": func(a attack) error {
			return socketOf(unix.AF_INET6, unix.SOCK_DGRAM, 0, a.send)
		},
		"udp IP_PKTINFO":     udpPacketInfo,
		"udp IP_UNICAST_IF":  udpUnicastDevice,
		"udp IP_TRANSPARENT": udpForeignSource(unix.IP_TRANSPARENT),
		"udp IP_FREEBIND":    udpForeignSource(unix.IP_FREEBIND),
		"udp sendmmsg":       udpMany,
		"udp io_uring":       udpByRing,
		"udp in fragments": func(a attack) error {
			return socketOf(a.domain(), unix.SOCK_DGRAM, 0, func(fd int) error {
				return unix.Sendto(fd, bytes.Repeat([]byte(marker), 400), 0, sockaddr(fd, a.To))
			})
		},
		"udp UDP_SEGMENT": sent(unix.SOCK_DGRAM, 0, option(unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1200)),
		"udp MSG_MORE": func(a attack) error {
			return socketOf(a.domain(), unix.SOCK_DGRAM, 0, func(fd int) error {
				if err := unix.Sendto(fd, []byte(marker), unix.MSG_MORE, sockaddr(fd, a.To)); err != nil {
					return err
				}
				return a.send(fd)
			})
		},
		"udp to a group":     toGroup,
		"udp broadcast":      sentTo(netip.MustParseAddr("255.255.255.255")),
		"udp-lite":           sent(unix.SOCK_DGRAM, unix.IPPROTO_UDPLITE),
		"udp-lite connected": connected(unix.SOCK_DGRAM, unix.IPPROTO_UDPLITE),
		"icmp":               icmpEcho(unix.SOCK_RAW),
		"ping socket":        icmpEcho(unix.SOCK_DGRAM),
		"raw udp":            sent(unix.SOCK_RAW, unix.IPPROTO_UDP),
		"raw tcp":            sent(unix.SOCK_RAW, unix.IPPROTO_TCP),
		"raw with a header":  rawWithHeader,
		"sctp":               connected(unix.SOCK_STREAM, unix.IPPROTO_SCTP),
		"sctp seqpacket":     sent(unix.SOCK_SEQPACKET, unix.IPPROTO_SCTP),
		"dccp":               connected(unix.SOCK_DCCP, unix.IPPROTO_DCCP),
		"l2tp":               sent(unix.SOCK_DGRAM, ipprotoL2TP),
		"packet": func(a attack) error {
			return socketOf(unix.AF_PACKET, unix.SOCK_DGRAM, 0, a.packet)
		},
		"packet without a queue": func(a attack) error {
			return socketOf(unix.AF_PACKET, unix.SOCK_DGRAM, 0, func(fd int) error {
				if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, 20, 1); err != nil { // PACKET_QDISC_BYPASS
					return err
				}
				return a.packet(fd)
			})
		},
		"packet of AF_INET": func(a attack) error { return socketOf(unix.AF_INET, unix.SOCK_PACKET, 0, a.packet) },
		"vsock":             onlyMade(unix.AF_VSOCK, unix.SOCK_STREAM),
		"xdp":               onlyMade(unix.AF_XDP, unix.SOCK_RAW),
		"smc":               onlyMade(unix.AF_SMC, unix.SOCK_STREAM),
		"tipc":              onlyMade(unix.AF_TIPC, unix.SOCK_RDM),
		"can":               onlyMade(unix.AF_CAN, unix.SOCK_RAW),
	}
	for name, family := range otherFamilies() {
		ways[name] = onlyMade(family, unix.SOCK_DGRAM)
	}
	return ways
}

// otherFamilies are those that reach outside, of which hardly a kernel has all.
func otherFamilies() map[string]int {
	return map[string]int{
		"rds": unix.AF_RDS, "kcm": unix.AF_KCM, "pppox": unix.AF_PPPOX, "bluetooth": unix.AF_BLUETOOTH, "rxrpc": unix.AF_RXRPC, "qipcrtr": unix.AF_QIPCRTR,
		"phonet": unix.AF_PHONET, "ieee802154": unix.AF_IEEE802154, "nfc": unix.AF_NFC, "llc": unix.AF_LLC, "mctp": unix.AF_MCTP, "x25": unix.AF_X25,
	}
}

// udpByRing connects by io_uring and sends.
func udpByRing(a attack) error {
	return socketOf(a.domain(), unix.SOCK_DGRAM, 0, func(fd int) error {
		if err := connectByRing(fd, a.To, ringAsync); err != nil {
			return err
		}
		_, err := unix.Write(fd, []byte(marker))
		return err
	})
}

// toGroup sends to everybody who listens to a group by the device that leads out.
func toGroup(a attack) error {
	group := "239.1.2.3"
	if a.To.Addr().Is6() {
		group = "ff15::123"
	}
	return sentTo(netip.MustParseAddr(group))(a)
}

func sentTo(to netip.Addr) func(attack) error {
	return func(a attack) error {
		a.To = netip.AddrPortFrom(to, a.To.Port())
		return sent(unix.SOCK_DGRAM, 0, func(_ attack, fd int) error {
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1); err != nil {
				return err
			}
			return unix.BindToDevice(fd, "eth0")
		})(a)
	}
}

func onlyMade(domain, kind int) func(attack) error {
	return func(attack) error { return socketOf(domain, kind, 0, func(int) error { return nil }) }
}

func udpAgain(a attack) error {
	return socketOf(a.domain(), unix.SOCK_DGRAM, 0, func(fd int) error {
		local := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), 9)
		if a.To.Addr().Is6() {
			local = netip.AddrPortFrom(netip.IPv6Loopback(), 9)
		}
		unspecified := unix.RawSockaddr{Family: unix.AF_UNSPEC}
		if err := unix.Connect(fd, sockaddr(fd, local)); err != nil {
			return err
		}
		if _, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unspecified)), unsafe.Sizeof(unspecified)); errno != 0 {
			return errno
		}
		return a.send(fd)
	})
}

func udpPacketInfo(a attack) error {
	return socketOf(a.domain(), unix.SOCK_DGRAM, 0, func(fd int) error {
		control := unix.PktInfo4(&unix.Inet4Pktinfo{Ifindex: int32(a.Device)})
		if a.To.Addr().Is6() {
			control = unix.PktInfo6(&unix.Inet6Pktinfo{Ifindex: uint32(a.Device)})
		}
		return unix.Sendmsg(fd, []byte(marker), control, sockaddr(fd, a.To), 0)
	})
}

func udpUnicastDevice(a attack) error {
	return socketOf(a.domain(), unix.SOCK_DGRAM, 0, func(fd int) error {
		level, name := unix.SOL_IP, unix.IP_UNICAST_IF
		if a.To.Addr().Is6() {
			level, name = unix.SOL_IPV6, unix.IPV6_UNICAST_IF
		}
		device := binary.BigEndian.AppendUint32(nil, uint32(a.Device))
		if err := unix.SetsockoptString(fd, level, name, string(device)); err != nil {
			return err
		}
		return a.send(fd)
	})
}

func udpForeignSource(name int) func(attack) error {
	return func(a attack) error {
		return socketOf(unix.AF_INET, unix.SOCK_DGRAM, 0, func(fd int) error {
			if err := unix.SetsockoptInt(fd, unix.SOL_IP, name, 1); err != nil {
				return err
			}
			if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{192, 0, 2, 9}, Port: 4001}); err != nil {
				return err
			}
			return a.send(fd)
		})
	}
}

// udpMany sends by sendmmsg, one message.
func udpMany(a attack) error {
	return socketOf(a.domain(), unix.SOCK_DGRAM, 0, func(fd int) error {
		name, length := encodeSockaddr(sockaddr(fd, a.To))
		text := []byte(marker)
		vector := unix.Iovec{Base: &text[0]}
		vector.SetLen(len(text))
		message := struct {
			header unix.Msghdr
			sent   uint32
			_      uint32
		}{header: unix.Msghdr{Name: &name[0], Namelen: length, Iov: &vector, Iovlen: 1}}
		if _, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&message)), 1, 0, 0, 0); errno != 0 {
			return errno
		}
		return nil
	})
}

// icmpEcho sends a request with the marker in it.
func icmpEcho(kind int) func(attack) error {
	return func(a attack) error {
		protocol, first := unix.IPPROTO_ICMP, byte(8)
		if a.To.Addr().Is6() {
			protocol, first = unix.IPPROTO_ICMPV6, 128
		}
		return socketOf(a.domain(), kind, protocol, func(fd int) error {
			request := append([]byte{first, 0, 0, 0, 0, 1, 0, 1}, marker...)
			return unix.Sendto(fd, request, 0, sockaddr(fd, netip.AddrPortFrom(a.To.Addr(), 0)))
		})
	}
}

// ipPacket is a datagram of UDP with its header of IPv4.
func (a attack) ipPacket() []byte {
	packet := make([]byte, 28, 28+len(marker))
	packet[0], packet[8], packet[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(packet[2:], uint16(28+len(marker)))
	copy(packet[12:], []byte{192, 0, 2, 9})
	copy(packet[16:], a.To.Addr().AsSlice())
	binary.BigEndian.PutUint16(packet[20:], 4001)
	binary.BigEndian.PutUint16(packet[22:], a.To.Port())
	binary.BigEndian.PutUint16(packet[24:], uint16(8+len(marker)))
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(packet[i:]))
	}
	binary.BigEndian.PutUint16(packet[10:], ^uint16(sum+sum>>16))
	return append(packet, marker...)
}

const (
	tcpSYN = 0x02
	tcpACK = 0x10
)

// tcpPacket is a segment of TCP with its header of IPv4.
func (a attack) tcpPacket(flags byte) []byte {
	packet := append(a.ipPacket()[:20], make([]byte, 20)...)
	packet[9] = unix.IPPROTO_TCP // the kernel counts the header's length and sum itself
	binary.BigEndian.PutUint16(packet[20:], 4001)
	binary.BigEndian.PutUint16(packet[22:], a.To.Port())
	packet[32], packet[33] = 5<<4, flags
	return append(packet, marker...)
}

func rawWithHeader(a attack) error {
	return socketOf(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW, func(fd int) error {
		return unix.Sendto(fd, a.ipPacket(), 0, sockaddr(fd, a.To))
	})
}

// packet sends it to everybody on the wire.
func (a attack) packet(fd int) error {
	to := &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IP), Ifindex: a.Device, Halen: 6, Addr: [8]byte{255, 255, 255, 255, 255, 255}}
	return unix.Sendto(fd, a.ipPacket(), 0, to)
}
