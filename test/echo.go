// SPDX-License-Identifier: MPL-2.0

package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Server is an echo server. To each TCP connection it writes a [Reply] as one line
// of JSON, then returns what it reads; to [AskAgain] it replies anew. Each datagram it answers with a Reply, from
// the address the datagram was sent to.
type Server struct {
	// Name is in the server's replies, and no other server has it.
	Name string
	// Addr is where the server listens.
	Addr netip.AddrPort

	closer io.Closer
	done   sync.WaitGroup
	mutex  sync.Mutex
	conns  map[net.Conn]struct{}
}

// Reply is what a [Server] tells of a connection or a datagram as it sees it.
type Reply struct {
	// Server is the name of the server that answered.
	Server string `json:"server"`
	// Peer is who dialled.
	Peer netip.AddrPort `json:"peer"`
	// Local is the address the connection or the datagram came in on.
	Local netip.AddrPort `json:"local"`
	// Origin is what SO_ORIGINAL_DST answers; not valid where the kernel has none.
	Origin netip.AddrPort `json:"origin,omitzero"`
}

// Echo starts a server in the namespace. Network is tcp or udp, with 4 or 6 for one
// family; addr is host:port, where port 0 lets the kernel choose. The listener is
// plain TCP, not MPTCP.
func Echo(tb testing.TB, ns *NetNS, network, addr string) *Server {
	tb.Helper()
	var server *Server
	var err error
	ns.Do(func() { server, err = listen("in "+ns.Path, network, addr) })
	if err != nil {
		tb.Fatalf("start echo server: %v", err)
	}
	tb.Cleanup(server.Close)
	return server
}

// Close ends the server, its listener and its connections.
func (s *Server) Close() {
	s.closer.Close()
	s.mutex.Lock()
	for conn := range s.conns {
		conn.Close()
	}
	s.mutex.Unlock()
	s.done.Wait()
}

// listen starts a server on the calling thread's namespace. Where tells servers with
// the same address apart.
func listen(where, network, addr string) (*Server, error) {
	s := &Server{conns: map[net.Conn]struct{}{}}
	var config net.ListenConfig
	if strings.HasPrefix(network, "udp") {
		packets, err := config.ListenPacket(context.Background(), network, addr)
		if err != nil {
			return nil, err
		}
		conn := packets.(*net.UDPConn)
		if err := receiveDestination(conn); err != nil {
			return nil, errors.Join(fmt.Errorf("ask for packet info: %w", err), conn.Close())
		}
		s.closer, s.Addr = conn, unmap(conn.LocalAddr().(*net.UDPAddr).AddrPort())
		s.Name = fmt.Sprintf("%s %s %s", network, s.Addr, where)
		s.done.Go(func() { s.answer(conn) })
		return s, nil
	}
	config.SetMultipathTCP(false)
	listener, err := config.Listen(context.Background(), network, addr)
	if err != nil {
		return nil, err
	}
	s.closer, s.Addr = listener, unmap(listener.Addr().(*net.TCPAddr).AddrPort())
	s.Name = fmt.Sprintf("%s %s %s", network, s.Addr, where)
	s.done.Go(func() { s.accept(listener) })
	return s, nil
}

func (s *Server) accept(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		s.mutex.Lock()
		s.conns[conn] = struct{}{}
		s.mutex.Unlock()
		s.done.Go(func() {
			s.serve(conn.(*net.TCPConn))
			s.mutex.Lock()
			delete(s.conns, conn)
			s.mutex.Unlock()
		})
	}
}

func (s *Server) serve(conn *net.TCPConn) {
	defer conn.Close()
	if s.reply(conn) != nil {
		return
	}
	for buffer := make([]byte, 32<<10); ; {
		count, err := conn.Read(buffer)
		if err != nil {
			return // the dialler or Close has ended the connection
		}
		if string(buffer[:count]) == enquiry {
			err = s.reply(conn)
		} else {
			_, err = conn.Write(buffer[:count])
		}
		if err != nil {
			return
		}
	}
}

// enquiry is what AskAgain sends.
const enquiry = "what do you see?\n"

func (s *Server) reply(conn *net.TCPConn) error {
	reply := Reply{
		Server: s.Name,
		Peer:   unmap(conn.RemoteAddr().(*net.TCPAddr).AddrPort()),
		Local:  unmap(conn.LocalAddr().(*net.TCPAddr).AddrPort()),
	}
	// Without a redirect there is no origin: the error is the answer.
	reply.Origin, _ = originalDestination(conn, reply.Local.Addr().Is4())
	return json.NewEncoder(conn).Encode(reply)
}

// originalDestination asks as Envoy does: at the level of the local address's family,
// with room for either family's answer.
func originalDestination(conn syscall.Conn, ipv4 bool) (netip.AddrPort, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	level := unix.SOL_IPV6
	if ipv4 {
		level = unix.SOL_IP
	}
	var origin netip.AddrPort
	var optErr error
	err = raw.Control(func(fd uintptr) {
		const originalDst = 80 // SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST
		// A struct ip6_mtuinfo begins with a sockaddr_in6, and is larger than it.
		answer, err := unix.GetsockoptIPv6MTUInfo(int(fd), level, originalDst)
		if err != nil {
			optErr = err
			return
		}
		raw := (*[unix.SizeofIPv6MTUInfo]byte)(unsafe.Pointer(answer))
		port := uint16(raw[2])<<8 | uint16(raw[3])
		if answer.Addr.Family == unix.AF_INET {
			origin = netip.AddrPortFrom(netip.AddrFrom4([4]byte(raw[4:8])), port)
		} else {
			origin = netip.AddrPortFrom(netip.AddrFrom16(answer.Addr.Addr), port)
		}
	})
	return origin, errors.Join(err, optErr)
}

func (s *Server) answer(conn *net.UDPConn) {
	port := s.Addr.Port()
	data, control := make([]byte, 64<<10), make([]byte, 128)
	for {
		_, n, _, peer, err := conn.ReadMsgUDPAddrPort(data, control)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error of an earlier answer
		}
		local, from := destination(control[:n])
		reply := Reply{Server: s.Name, Peer: unmap(peer), Local: netip.AddrPortFrom(local, port)}
		line, err := json.Marshal(reply)
		if err != nil {
			return
		}
		// An answer may be lost as any datagram may: the one who asks reports it.
		_, _, _ = conn.WriteMsgUDPAddrPort(append(line, '\n'), from, peer)
	}
}

// receiveDestination makes the kernel tell where a datagram was sent to.
func receiveDestination(conn *net.UDPConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var optErr error
	err = raw.Control(func(fd uintptr) {
		var domain int
		if domain, optErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN); optErr != nil {
			return
		}
		if domain == unix.AF_INET6 {
			optErr = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1)
		} else {
			optErr = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_PKTINFO, 1)
		}
	})
	return errors.Join(err, optErr)
}

// destination reads a datagram's destination from its control messages and returns
// the control message that answers from there.
func destination(control []byte) (netip.Addr, []byte) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return netip.Addr{}, nil
	}
	for _, m := range messages {
		switch {
		case m.Header.Level == unix.SOL_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo:
			to := [4]byte(m.Data[8:12])
			return netip.AddrFrom4(to), unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: to})
		case m.Header.Level == unix.SOL_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= unix.SizeofInet6Pktinfo:
			to := [16]byte(m.Data[:16])
			return netip.AddrFrom16(to).Unmap(), unix.PktInfo6(&unix.Inet6Pktinfo{Addr: to})
		}
	}
	return netip.Addr{}, nil
}

func unmap(addr netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
}
