// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// rareWays are those of TCP that choose a way, and those that need something of
// outside the namespace or CAP_NET_ADMIN in it.
func rareWays() map[string]func(attack) error {
	option := func(level, name, value int) func(attack, int) error {
		return func(_ attack, fd int) error { return unix.SetsockoptInt(fd, level, name, value) }
	}
	return map[string]func(attack) error{
		"tcp SO_DONTROUTE":      dialled(option(unix.SOL_SOCKET, unix.SO_DONTROUTE, 1)),
		"tcp IP_UNICAST_IF":     dialled(unicastDevice),
		"tcp TCP_REPAIR":        dialled(option(unix.IPPROTO_TCP, unix.TCP_REPAIR, 1)),
		"tcp by a scope":        dialled(),
		"udp by a scope":        sentByScope,
		"passed socket":         passedSocket,
		"setns":                 socketElsewhere(attack.send),
		"tun":                   tunnelled(false),
		"tap bridged with eth0": tunnelled(true),
	}
}

func unicastDevice(a attack, fd int) error {
	level, name := unix.SOL_IP, unix.IP_UNICAST_IF
	if a.To.Addr().Is6() {
		level, name = unix.SOL_IPV6, unix.IPV6_UNICAST_IF
	}
	return unix.SetsockoptString(fd, level, name, string(binary.BigEndian.AppendUint32(nil, uint32(a.Device))))
}

// to is the peer, by the device where it is a link-local one.
func (a attack) to(fd int) unix.Sockaddr {
	sa := sockaddr(fd, a.To)
	if six, ok := sa.(*unix.SockaddrInet6); ok && a.To.Addr().IsLinkLocalUnicast() {
		six.ZoneId = uint32(a.Device)
	}
	return sa
}

// dialled opens a TCP socket, sets it up, connects it and writes.
func dialled(setUp ...func(a attack, fd int) error) func(attack) error {
	return func(a attack) error {
		return socketOf(a.domain(), unix.SOCK_STREAM, 0, func(fd int) error {
			for _, step := range setUp {
				if err := step(a, fd); err != nil {
					return err
				}
			}
			limit := unix.Timeval{Sec: scriptPatience}
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit); err != nil {
				return err
			}
			if err := unix.Connect(fd, a.to(fd)); err != nil {
				return err
			}
			if repair, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR); err == nil && repair == 1 {
				if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, -1); err != nil { // without a probe
					return err
				}
			}
			_, err := unix.Write(fd, []byte(marker))
			return err
		})
	}
}

func sentByScope(a attack) error {
	return socketOf(unix.AF_INET6, unix.SOCK_DGRAM, 0, func(fd int) error {
		return unix.Sendto(fd, []byte(marker), 0, a.to(fd))
	})
}

// socketElsewhere makes a socket of UDP in another namespace, as one who may enter it,
// and hands it to action in the own one.
func socketElsewhere(action func(attack, int) error) func(attack) error {
	return func(a attack) error {
		runtime.LockOSThread() // and the thread ends with it where it cannot go back
		own, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			return err
		}
		defer own.Close()
		other, err := os.Open(a.Elsewhere)
		if err != nil {
			return err
		}
		defer other.Close()
		if err := unix.Setns(int(other.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		fd, err := unix.Socket(a.domain(), unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if back := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); back != nil {
			return back
		}
		runtime.UnlockOSThread()
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return action(a, fd)
	}
}

// passedSocket sends by a socket that came by SCM_RIGHTS from who made it elsewhere.
func passedSocket(a attack) error {
	return socketElsewhere(func(a attack, fd int) error {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(pair[0])
		defer unix.Close(pair[1])
		if err := unix.Sendmsg(pair[0], []byte("?"), unix.UnixRights(fd), nil, 0); err != nil {
			return err
		}
		control := make([]byte, unix.CmsgSpace(4))
		if _, _, _, _, err = unix.Recvmsg(pair[1], make([]byte, 1), control, unix.MSG_CMSG_CLOEXEC); err != nil {
			return err
		}
		messages, err := unix.ParseSocketControlMessage(control)
		if err != nil {
			return err
		}
		passed, err := unix.ParseUnixRights(&messages[0])
		if err != nil {
			return err
		}
		defer unix.Close(passed[0])
		return a.send(passed[0])
	})(a)
}

// tunnelled puts a packet into the namespace by a device of its own: to be forwarded by
// IP or, with bridged, by a bridge that has the device which leads out, too.
func tunnelled(bridged bool) func(attack) error {
	return func(a attack) error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		request, err := unix.NewIfreq("attack0")
		if err != nil {
			return err
		}
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		if bridged {
			request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		}
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
			return err
		}
		device, err := netlink.LinkByName("attack0")
		if err != nil {
			return err
		}
		packet := a.ipPacket()
		if bridged {
			bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "attack1"}}
			if err := netlink.LinkAdd(bridge); err != nil {
				return err
			}
			defer netlink.LinkDel(bridge) //nolint:errcheck // the namespace ends with the test
			outer, err := netlink.LinkByIndex(a.Device)
			if err != nil {
				return err
			}
			for _, port := range []netlink.Link{device, outer} {
				if err := netlink.LinkSetMaster(port, bridge); err != nil {
					return err
				}
			}
			if err := netlink.LinkSetUp(bridge); err != nil {
				return err
			}
			// With br_netfilter a bridge would ask the rules of IP; the namespace's root says whether.
			if err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-iptables", []byte("0"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			frame := append([]byte{255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 9}, 8, 0)
			packet = append(frame, packet...)
		} else {
			for _, path := range []string{"ipv4/ip_forward", "ipv4/conf/attack0/forwarding"} {
				if err := os.WriteFile("/proc/sys/net/"+path, []byte("1"), 0); err != nil {
					return err
				}
			}
			for _, path := range []string{"ipv4/conf/all/rp_filter", "ipv4/conf/attack0/rp_filter"} {
				if err := os.WriteFile("/proc/sys/net/"+path, []byte("0"), 0); err != nil {
					return err
				}
			}
		}
		if err := netlink.LinkSetUp(device); err != nil {
			return err
		}
		_, err = unix.Write(fd, packet)
		return err
	}
}
