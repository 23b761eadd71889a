// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/test"
)

// sockets is a process that makes system calls on sockets when a test says so: what
// Go's own net package hides, a listener among many, a datagram to each of two servers.
type sockets struct {
	*test.Process
	t *testing.T
}

// socketCall is one request to a sockets process. FD names the socket in that process.
type socketCall struct {
	Op                   string
	FD                   int
	Family, Type, Proto  int
	Level, Option, Value int
	Addr                 netip.AddrPort
	Addrs                []netip.AddrPort
	Name                 string
	Len                  int
}

type socketResult struct {
	FD    int
	Addr  netip.AddrPort
	Data  []byte
	Names []netip.AddrPort
}

const socketsFunc = "redirect.sockets"

func newSockets(t *testing.T, spec test.Spec) *sockets {
	t.Helper()
	return &sockets{Process: test.Helper(t, spec, socketsFunc), t: t}
}

// sockets starts a process of the allocation.
func (a *alloc) sockets(uid uint32, cgroup *test.Cgroup) *sockets {
	a.node.t.Helper()
	return newSockets(a.node.t, test.Spec{NetNS: a.NetNS, Cgroup: cgroup, UID: uid, GID: uid})
}

func (s *sockets) try(call socketCall) (socketResult, error) {
	var result socketResult
	err := s.Call(call, &result)
	return result, err
}

func (s *sockets) must(call socketCall) socketResult {
	s.t.Helper()
	result, err := s.try(call)
	if err != nil {
		s.t.Fatalf("%s: %v", call.Op, err)
	}
	return result
}

func (s *sockets) open(family, kind, proto int) int {
	s.t.Helper()
	return s.must(socketCall{Op: "open", Family: family, Type: kind, Proto: proto}).FD
}

// listenOption is a socket option that a listener gets before it binds.
type listenOption struct{ level, option int }

func reusePort() listenOption { return listenOption{unix.SOL_SOCKET, unix.SO_REUSEPORT} }

// bind opens a socket for a listener and binds it. Proto is 0 for plain TCP.
func (s *sockets) bind(addr string, proto int, options ...listenOption) (int, error) {
	to := netip.MustParseAddrPort(addr)
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	s.t.Helper()
	fd := s.open(family, unix.SOCK_STREAM, proto)
	for _, o := range append(options, listenOption{unix.SOL_SOCKET, unix.SO_REUSEADDR}) {
		s.must(socketCall{Op: "option", FD: fd, Level: o.level, Option: o.option, Value: 1})
	}
	if _, err := s.try(socketCall{Op: "bind", FD: fd, Addr: to}); err != nil {
		return fd, fmt.Errorf("bind: %w", err)
	}
	return fd, nil
}

// listen opens a listener that answers every connection with a test.Reply under name.
func (s *sockets) listen(name, addr string, proto int, options ...listenOption) (int, error) {
	s.t.Helper()
	fd, err := s.bind(addr, proto, options...)
	if err != nil {
		return fd, err
	}
	if _, err := s.try(socketCall{Op: "serve", FD: fd, Name: name}); err != nil {
		return fd, fmt.Errorf("listen: %w", err)
	}
	return fd, nil
}

func (s *sockets) mustListen(name, addr string, options ...listenOption) int {
	s.t.Helper()
	fd, err := s.listen(name, addr, 0, options...)
	if err != nil {
		s.t.Fatalf("listen on %s: %v", addr, err)
	}
	return fd
}

func (s *sockets) close(fd int) {
	s.t.Helper()
	s.must(socketCall{Op: "close", FD: fd})
}

func serveSockets([]string) error {
	hosted := &socketHost{listeners: make(map[int]net.Listener)}
	return test.Serve(hosted.call)
}

// socketHost is the other end of sockets.
type socketHost struct{ listeners map[int]net.Listener }

// socketPatience bounds a system call; it is only spent where packets are lost.
const socketPatience = 3 * time.Second

func (h *socketHost) call(c socketCall) (result socketResult, err error) {
	switch c.Op {
	case "open":
		if result.FD, err = unix.Socket(c.Family, c.Type|unix.SOCK_CLOEXEC, c.Proto); err != nil {
			return result, err
		}
		timeout := unix.NsecToTimeval(int64(socketPatience))
		for _, option := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
			if err := unix.SetsockoptTimeval(result.FD, unix.SOL_SOCKET, option, &timeout); err != nil {
				return result, err
			}
		}
		return result, nil
	case "option":
		return result, unix.SetsockoptInt(c.FD, c.Level, c.Option, c.Value)
	case "bind":
		return result, unix.Bind(c.FD, h.sockaddr(c.FD, c.Addr))
	case "listen":
		return result, unix.Listen(c.FD, 128)
	case "serve":
		return result, h.serve(c.FD, c.Name)
	case "connect":
		return result, finishConnect(c.FD, unix.Connect(c.FD, h.sockaddr(c.FD, c.Addr)), unix.EINTR)
	case "disconnect":
		return result, h.disconnect(c.FD)
	case "send":
		if !c.Addr.IsValid() {
			_, err = unix.Write(c.FD, []byte("?"))
			return result, err
		}
		return result, unix.Sendto(c.FD, []byte("?"), 0, h.sockaddr(c.FD, c.Addr))
	case "receive":
		return h.receive(c.FD)
	case "sendmmsg":
		return result, h.sendAll(c.FD, c.Addrs)
	case "recvmmsg":
		return h.receiveAll(c.FD, c.Len)
	case "name", "peer":
		result.Addr, err = h.socketName(c.FD, c.Op == "peer")
		return result, err
	case "getsockopt":
		result.Data, err = h.getsockopt(c.FD, c.Level, c.Option, c.Len)
		return result, err
	case "close":
		if listener := h.listeners[c.FD]; listener != nil {
			delete(h.listeners, c.FD)
			return result, listener.Close()
		}
		return result, unix.Close(c.FD)
	}
	return result, fmt.Errorf("unknown operation %q", c.Op)
}

// serve listens and answers. The listener's descriptor becomes one of the Go
// runtime; the number stays its name.
func (h *socketHost) serve(fd int, name string) error {
	if err := unix.Listen(fd, 1024); err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), name)
	listener, err := net.FileListener(file)
	if err != nil {
		return err
	}
	// The number stays taken, so that no other socket gets the name.
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	if err := unix.Dup3(int(null.Fd()), fd, unix.O_CLOEXEC); err != nil {
		return err
	}
	h.listeners[fd] = listener
	go func() {
		defer file.Close()
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go h.answerOne(conn, name)
		}
	}()
	return nil
}

func (h *socketHost) answerOne(conn net.Conn, name string) {
	defer conn.Close()
	reply := test.Reply{Server: name, Peer: plainAddr(conn.RemoteAddr()), Local: plainAddr(conn.LocalAddr())}
	if tcp, ok := conn.(syscall.Conn); ok {
		reply.Origin, _ = h.originalDestination(tcp, reply.Local.Addr().Is4())
	}
	// A dialler that is gone needs no answer.
	_ = json.NewEncoder(conn).Encode(reply)
}

// originalDestination asks at the level of the local address's family; not valid
// where the kernel has none.
func (h *socketHost) originalDestination(conn syscall.Conn, ipv4 bool) (origin netip.AddrPort, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return origin, err
	}
	level := unix.SOL_IPV6
	if ipv4 {
		level = unix.SOL_IP
	}
	var answer []byte
	if controlErr := raw.Control(func(fd uintptr) { answer, err = h.getsockopt(int(fd), level, 80, 128) }); controlErr != nil {
		return origin, controlErr
	}
	if err != nil {
		return origin, err
	}
	return parseSockaddr(answer), nil
}

func parseSockaddr(raw []byte) netip.AddrPort {
	port := uint16(raw[2])<<8 | uint16(raw[3])
	if *(*uint16)(unsafe.Pointer(&raw[0])) == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(raw[4:8])), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(raw[8:24])), port)
}

func plainAddr(addr net.Addr) netip.AddrPort {
	parsed, err := netip.ParseAddrPort(addr.String())
	if err != nil {
		return parsed
	}
	return netip.AddrPortFrom(parsed.Addr().Unmap(), parsed.Port())
}
