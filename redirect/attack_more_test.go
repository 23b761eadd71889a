// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// rareWays are those of TCP that choose a way, and those that need something of
// outside the namespace.
func rareWays() map[string]func(attack) error {
	option := func(level, name, value int) func(attack, int) error {
		return func(_ attack, fd int) error { return unix.SetsockoptInt(fd, level, name, value) }
	}
	return map[string]func(attack) error{
		"tcp SO_DONTROUTE":  dialled(option(unix.SOL_SOCKET, unix.SO_DONTROUTE, 1)),
		"tcp IP_UNICAST_IF": dialled(unicastDevice),
		"tcp TCP_REPAIR":    dialled(option(unix.IPPROTO_TCP, unix.TCP_REPAIR, 1)),
		"tcp by a scope":    dialled(option(unix.IPPROTO_TCP, unix.TCP_SYNCNT, 1)),
		"udp by a scope":    sentByScope,
		"passed socket":     passedSocket,
		"packet, kept":      keptPacketSocket,
		"fetched socket":    fetchedSocket,
		"netlink":           onlyMade(unix.AF_NETLINK, unix.SOCK_RAW),
		"key":               func(attack) error { return socketOf(unix.AF_KEY, unix.SOCK_RAW, 2, func(int) error { return nil }) }, // PF_KEY_V2
		"alg":               onlyMade(unix.AF_ALG, unix.SOCK_SEQPACKET),
		"unix": func(a attack) error {
			return socketOf(unix.AF_UNIX, unix.SOCK_STREAM, 0, func(fd int) error {
				return unix.Connect(fd, &unix.SockaddrUnix{Name: a.Elsewhere})
			})
		},
		"setns": socketElsewhere(attack.send),

		"udp in new namespaces": inNewNamespaces("udp"),
		"tcp in new namespaces": inNewNamespaces("tcp SO_DONTROUTE"),
		"raw in new namespaces": inNewNamespaces("raw with a header"),
	}
}

// keptPacketSocket opens a packet socket that ends with the process.
func keptPacketSocket(attack) error {
	_, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	return err
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
			if err := finishConnect(fd, unix.Connect(fd, a.to(fd)), unix.EINTR); err != nil {
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

// fetchedSocket sends by a socket that pidfd_getfd takes from who made it elsewhere.
func fetchedSocket(a attack) error {
	return socketElsewhere(func(a attack, fd int) error {
		maker, err := unix.PidfdOpen(os.Getpid(), 0)
		if err != nil {
			return err
		}
		defer unix.Close(maker)
		fetched, err := unix.PidfdGetfd(maker, fd, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fetched)
		return a.send(fetched)
	})(a)
}

// inNewNamespaces goes another way in a user and a network namespace of its own.
func inNewNamespaces(way string) func(attack) error {
	return func(a attack) error {
		a.Way = way
		request, err := json.Marshal(a)
		if err != nil {
			return err
		}
		cmd := exec.Command("/proc/self/exe", "-test.run=^$", "--") // in the role that this process has
		cmd.Stdin = bytes.NewReader(request)
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
			UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
		}
		output, err := cmd.Output()
		if err != nil {
			return err
		}
		var answer struct {
			Value syscall.Errno
			Error any
		}
		switch err := json.Unmarshal(output, &answer); {
		case err != nil:
			return err
		case answer.Error != nil:
			return fmt.Errorf("%s: %v", way, answer.Error)
		case answer.Value != 0:
			return answer.Value
		}
		return nil
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
