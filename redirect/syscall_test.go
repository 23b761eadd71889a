// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// sockaddr is addr in the family of the socket: an IPv4 address on an IPv6 socket
// takes the mapped form.
func (h *socketHost) sockaddr(fd int, addr netip.AddrPort) unix.Sockaddr {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err == nil && domain == unix.AF_INET {
		return &unix.SockaddrInet4{Addr: addr.Addr().As4(), Port: int(addr.Port())}
	}
	return &unix.SockaddrInet6{Addr: addr.Addr().As16(), Port: int(addr.Port())}
}

// encodeSockaddr is sockaddr as the kernel reads it.
func encodeSockaddr(sa unix.Sockaddr) (raw [unix.SizeofSockaddrInet6]byte, length uint32) {
	put := func(family uint16, port int) {
		*(*uint16)(unsafe.Pointer(&raw[0])) = family
		raw[2], raw[3] = byte(port>>8), byte(port)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		put(unix.AF_INET, sa.Port)
		copy(raw[4:], sa.Addr[:])
		return raw, unix.SizeofSockaddrInet4
	case *unix.SockaddrInet6:
		put(unix.AF_INET6, sa.Port)
		copy(raw[8:], sa.Addr[:])
	}
	return raw, unix.SizeofSockaddrInet6
}

func addrOf(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func (h *socketHost) socketName(fd int, peer bool) (netip.AddrPort, error) {
	get := unix.Getsockname
	if peer {
		get = unix.Getpeername
	}
	sa, err := get(fd)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return addrOf(sa), nil
}

// disconnect is connect with AF_UNSPEC, which takes a peer from a socket.
func (h *socketHost) disconnect(fd int) error {
	var unspec [16]byte
	if _, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unspec)), unsafe.Sizeof(unspec)); errno != 0 {
		return errno
	}
	return nil
}

// received is recvfrom that no signal ends, which the Go runtime sends to its own threads:
// the kernel does not begin it anew where the socket has a time limit, see signal(7).
func received(fd int, buffer []byte) (n int, from unix.Sockaddr, err error) {
	for {
		if n, from, err = unix.Recvfrom(fd, buffer, 0); err != unix.EINTR {
			return n, from, err
		}
	}
}

// acceptedBy is accept that no signal ends, as received.
func acceptedBy(listener int) (fd int, from unix.Sockaddr, err error) {
	for {
		if fd, from, err = unix.Accept4(listener, unix.SOCK_CLOEXEC); err != unix.EINTR {
			return fd, from, err
		}
	}
}

func TestNoSignalEndsAReceive(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	timeout := unix.NsecToTimeval(int64(time.Minute))
	if err := unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		t.Fatal(err)
	}
	thread, ended := make(chan int, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and the thread ends with it
		thread <- unix.Gettid()
		_, _, err := received(pair[0], make([]byte, 1))
		ended <- err
	}()
	id := <-thread
	for range 10 {
		test.Eventually(t, func() error {
			call, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/syscall", id))
			if err == nil && !strings.HasPrefix(string(call), fmt.Sprintf("%d ", unix.SYS_RECVFROM)) {
				err = fmt.Errorf("it is %q", call)
			}
			return err
		}, "the thread in recvfrom")
		if err := unix.Tgkill(os.Getpid(), id, unix.SIGURG); err != nil { // which the runtime uses
			t.Fatal(err)
		}
	}
	if _, err := unix.Write(pair[1], []byte("!")); err != nil {
		t.Error(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("receive: %v", err)
	}
}

func (h *socketHost) receive(fd int) (result socketResult, err error) {
	data := make([]byte, 4096)
	n, from, err := received(fd, data)
	if err != nil {
		return result, err
	}
	return socketResult{Data: data[:n], Addr: addrOf(from)}, nil
}

func (h *socketHost) getsockopt(fd, level, option, length int) ([]byte, error) {
	value := make([]byte, max(length, 1))
	size := uint32(length)
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&size)), 0); errno != 0 {
		return nil, errno
	}
	return value[:size], nil
}

// message is struct mmsghdr.
type message struct {
	header unix.Msghdr
	length uint32
	_      [4]byte
}

// sendAll sends one datagram to each address with a single sendmmsg.
func (h *socketHost) sendAll(fd int, addrs []netip.AddrPort) error {
	messages := make([]message, len(addrs))
	for i, addr := range addrs {
		data := []byte("?")
		raw, length := encodeSockaddr(h.sockaddr(fd, addr))
		messages[i].header.Name, messages[i].header.Namelen = &raw[0], length
		messages[i].header.Iov = &unix.Iovec{Base: &data[0], Len: 1}
		messages[i].header.SetIovlen(1)
	}
	sent, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&messages[0])), uintptr(len(messages)), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	if int(sent) != len(addrs) {
		return unix.EIO
	}
	return nil
}

// receiveAll receives count datagrams with recvmmsg, and returns who sent each.
func (h *socketHost) receiveAll(fd, count int) (result socketResult, err error) {
	for len(result.Names) < count {
		messages := make([]message, count-len(result.Names))
		names := make([][unix.SizeofSockaddrInet6]byte, len(messages))
		for i := range messages {
			data := make([]byte, 4096)
			messages[i].header.Name, messages[i].header.Namelen = &names[i][0], unix.SizeofSockaddrInet6
			messages[i].header.Iov = &unix.Iovec{Base: &data[0], Len: uint64(len(data))}
			messages[i].header.SetIovlen(1)
		}
		got, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&messages[0])), uintptr(len(messages)), unix.MSG_WAITFORONE, 0, 0)
		if errno != 0 {
			return result, errno
		}
		for _, name := range names[:got] {
			from := parseSockaddr(name[:])
			result.Names = append(result.Names, netip.AddrPortFrom(from.Addr().Unmap(), from.Port()))
		}
	}
	return result, nil
}
