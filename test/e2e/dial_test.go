// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/test"
)

// dialFunc names the process that dials as a task does: see dial.
const dialFunc = "e2e.dial"

// The kinds of TCP sockets that a task may dial with.
const (
	ipv4   = "ipv4"
	mapped = "mapped" // IPv6, dialling an IPv4-mapped address
	ipv6   = "ipv6"   // IPv6, dual-stack
	v6only = "v6only" // IPv6 with IPV6_V6ONLY
)

type dialRequest struct {
	Socket  string
	Targets []netip.AddrPort
	Workers int // how many targets are dialled at a time; 1 where zero
}

// exchange is what the task saw of one connection to an echo server.
type exchange struct {
	Target netip.AddrPort
	Peer   netip.AddrPort // getpeername(2), as the kernel says it
	Local  netip.AddrPort // getsockname(2)
	Reply  test.Reply     // what the server said
}

// dial connects to all targets and returns an exchange for each, in the order
// of the targets. The first error ends it.
func dial(request dialRequest) ([]exchange, error) {
	list := make([]exchange, len(request.Targets))
	errs := make([]error, len(request.Targets))
	next := make(chan int)
	var workers sync.WaitGroup
	for range max(1, request.Workers) {
		workers.Go(func() {
			for i := range next {
				list[i], errs[i] = dialOne(request.Socket, request.Targets[i])
			}
		})
	}
	for i := range request.Targets {
		next <- i
	}
	close(next)
	workers.Wait()
	return list, errors.Join(errs...)
}

func dialOne(kind string, target netip.AddrPort) (e exchange, err error) {
	e.Target = target
	fd, err := newSocket(kind)
	if err != nil {
		return e, fmt.Errorf("make socket: %w", err)
	}
	socket := os.NewFile(uintptr(fd), "socket")
	defer socket.Close()
	if err := connect(socket, kind, target); err != nil {
		return e, fmt.Errorf("connect to %s: %w", target, err)
	}
	if err := json.NewDecoder(socket).Decode(&e.Reply); err != nil {
		return e, fmt.Errorf("read reply of %s: %w", target, err)
	}
	peer, peerErr := unix.Getpeername(fd)
	local, localErr := unix.Getsockname(fd)
	e.Peer, e.Local = addrPort(peer), addrPort(local)
	return e, errors.Join(peerErr, localErr)
}

// newSocket makes a non-blocking socket: a connect of a blocking one ends
// with EINTR whenever the Go runtime sends itself a signal.
func newSocket(kind string) (int, error) {
	const flags = unix.SOCK_STREAM | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
	if kind == ipv4 {
		return unix.Socket(unix.AF_INET, flags, 0)
	}
	fd, err := unix.Socket(unix.AF_INET6, flags, 0)
	if err != nil {
		return -1, err
	}
	only := 0
	if kind == v6only {
		only = 1
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, only); err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// connect connects, and gives the whole exchange its deadline.
func connect(socket *os.File, kind string, target netip.AddrPort) error {
	if err := socket.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	var address unix.Sockaddr = &unix.SockaddrInet6{Addr: target.Addr().As16(), Port: int(target.Port())}
	if kind == ipv4 {
		address = &unix.SockaddrInet4{Addr: target.Addr().As4(), Port: int(target.Port())}
	}
	var connectErr error
	started := false
	err = raw.Write(func(fd uintptr) (done bool) {
		if !started {
			started = true
			connectErr = unix.Connect(int(fd), address)
			return !errors.Is(connectErr, unix.EINPROGRESS)
		}
		var code int
		if code, connectErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); code != 0 {
			connectErr = syscall.Errno(code)
		}
		if connectErr != nil {
			return true
		}
		_, err := unix.Getpeername(int(fd)) // fails until the connection is there
		return err == nil
	})
	return errors.Join(err, connectErr)
}

func addrPort(address unix.Sockaddr) netip.AddrPort {
	switch a := address.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	return netip.AddrPort{}
}
