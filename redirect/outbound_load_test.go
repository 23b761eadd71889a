// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/test"
)

// Helper processes for tests of very many connections: a proxy that tells each
// one what it saw of it in a few bytes, and a task that checks every word.
const (
	loadProxyFunc = "redirect.loadProxy"
	loadTaskFunc  = "redirect.loadTask"
)

// loadReply is what the proxy says to a connection.
type loadReply struct {
	Proxy        uint64 // which proxy it is
	Origin, Peer [16]byte
	OriginPort   uint16
	PeerPort     uint16
	_            uint32
}

const loadReplySize = int(unsafe.Sizeof(loadReply{}))

// startLoadProxy runs the allocation's outbound listener as one that says
// `name` to each connection.
func (a *alloc) startLoadProxy(t *testing.T, name uint64) {
	t.Helper()
	p := test.Helper(t, test.Spec{NetNS: a.NetNS, Cgroup: a.proxyCg, UID: proxyUID, GID: proxyUID},
		loadProxyFunc, strconv.FormatUint(name, 10), strconv.Itoa(outboundPort))
	if err := p.Call(nil, nil); err != nil {
		t.Fatalf("start proxy: %v", err)
	}
}

func serveLoadProxy(args []string) error {
	name, err := strconv.ParseUint(args[0], 10, 64)
	if err != nil {
		return err
	}
	port, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: port}); err != nil {
		return err
	}
	if err := unix.Listen(fd, 4096); err != nil {
		return err
	}
	for range 4 {
		go func() {
			for {
				loadAnswer(fd, name)
			}
		}()
	}
	// The test's call says that it waits, and its end of the pipe when it is done.
	if _, err := io.ReadFull(os.Stdin, make([]byte, 1)); err != nil {
		return err
	}
	if err := json.NewEncoder(os.Stdout).Encode(struct{ Value any }{}); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// loadAnswer takes one connection. Where something fails the task reads nothing
// and reports that.
func loadAnswer(listener int, name uint64) {
	fd, peer, err := acceptedBy(listener)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	from := fromSockaddr(peer)
	origin, err := loadOrigin(fd)
	if err != nil {
		return
	}
	reply := loadReply{
		Proxy: name, Origin: origin.Addr().As16(), OriginPort: origin.Port(),
		Peer: from.Addr().As16(), PeerPort: from.Port(),
	}
	_, _ = unix.Write(fd, (*[loadReplySize]byte)(unsafe.Pointer(&reply))[:])
}

func loadOrigin(fd int) (netip.AddrPort, error) {
	const originalDst = 80
	// As Envoy asks: at the level of the accepted socket, with room for either family.
	info, err := unix.GetsockoptIPv6MTUInfo(fd, unix.SOL_IP, originalDst)
	if err != nil {
		return netip.AddrPort{}, err
	}
	raw := (*[unix.SizeofIPv6MTUInfo]byte)(unsafe.Pointer(info))
	port := binary.BigEndian.Uint16(raw[2:])
	if info.Addr.Family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(raw[4:8])), port), nil
	}
	return netip.AddrPortFrom(netip.AddrFrom16(info.Addr.Addr).Unmap(), port), nil
}

// load asks a task to make many connections.
type load struct {
	Proxy        uint64 // that must answer
	Connections  int
	Destinations int // addresses; the i-th connection goes to the i-th of them, and around
	Ports        int // per destination, one after each round of the destinations
	Workers      int
	Source       netip.Addr // every second worker binds to it, and to a port that it chooses
	Source6      netip.Addr // what the task sees of it beside an IPv6 origin
}

// loadResult is what became of them.
type loadResult struct {
	Good, WrongProxy, WrongOrigin, WrongPeer, WrongName int
	Refused                                             int // with ENETUNREACH
	Failed                                              int
	Failure                                             string // the first one's
}

// loadDestination is the i-th destination of a load: the same in every
// namespace. Every fourth one is IPv6.
func (l load) destination(i int) netip.AddrPort {
	address, port := i%l.Destinations, 1000+i/l.Destinations%l.Ports
	var b [16]byte
	copy(b[:], []byte{0x20, 0x01, 0x0d, 0xb8})
	binary.BigEndian.PutUint32(b[12:], uint32(address))
	if address%4 == 3 {
		return netip.AddrPortFrom(netip.AddrFrom16(b), uint16(port))
	}
	b[12] = 20 // 20.0.0.0/8
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[12:])), uint16(port))
}

// loadTask is a task of the allocation that makes many connections.
func (a *alloc) loadTask(t *testing.T) *test.Process {
	t.Helper()
	return test.Helper(t, test.Spec{NetNS: a.NetNS, Cgroup: a.taskCg, UID: taskUID, GID: taskUID}, loadTaskFunc)
}

func serveLoadTask([]string) error {
	return test.Serve(func(l load) (loadResult, error) {
		results := make([]loadResult, l.Workers)
		var done sync.WaitGroup
		for worker := range results {
			done.Go(func() { results[worker] = l.work(worker) })
		}
		done.Wait()
		var sum loadResult
		for _, r := range results {
			sum.Good += r.Good
			sum.WrongProxy += r.WrongProxy
			sum.WrongOrigin += r.WrongOrigin
			sum.WrongPeer += r.WrongPeer
			sum.WrongName += r.WrongName
			sum.Refused += r.Refused
			sum.Failed += r.Failed
			sum.Failure += r.Failure
		}
		return sum, nil
	})
}

func (l load) work(worker int) (r loadResult) {
	const firstPort, ports = 5000, 3000 // below those that the kernel chooses
	for i := worker; i < l.Connections; i += l.Workers {
		source := netip.AddrPort{}
		if worker%2 == 1 && l.Source.IsValid() {
			source = netip.AddrPortFrom(l.Source, uint16(firstPort+worker*ports+i/l.Workers%ports))
		}
		switch err := l.one(l.destination(i), source, &r); {
		case err == unix.ENETUNREACH:
			r.Refused++
		case err != nil:
			if r.Failed++; r.Failure == "" {
				r.Failure = fmt.Sprintf("connection %d to %s: %v; ", i, l.destination(i), err)
			}
		}
	}
	return r
}

// one makes a connection and compares what both ends say of it.
func (l load) one(to, source netip.AddrPort, r *loadResult) error {
	domain := unix.AF_INET
	if to.Addr().Is6() {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// A reset instead of TIME_WAIT: the same tuples come again.
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return err
	}
	if source.IsValid() {
		if err := unix.Bind(fd, loadSockaddr(domain, source)); err != nil {
			return fmt.Errorf("bind %s: %w", source, err)
		}
	}
	if err := finishConnect(fd, unix.Connect(fd, loadSockaddr(domain, to)), unix.EINTR); err != nil {
		return err
	}
	var reply loadReply
	buffer := (*[loadReplySize]byte)(unsafe.Pointer(&reply))[:]
	for len(buffer) > 0 {
		n, err := unix.Read(fd, buffer)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return fmt.Errorf("read reply: %d bytes: %w", n, err)
		}
		buffer = buffer[n:]
	}
	var names outcome
	if err := readNames(fd, &names); err != nil {
		return err
	}
	origin := netip.AddrPortFrom(netip.AddrFrom16(reply.Origin).Unmap(), reply.OriginPort)
	peer := netip.AddrPortFrom(netip.AddrFrom16(reply.Peer).Unmap(), reply.PeerPort)
	own := l.Source
	if to.Addr().Is6() {
		own = l.Source6 // see answered
	}
	switch {
	case reply.Proxy != l.Proxy:
		r.WrongProxy++
	case origin != to:
		r.WrongOrigin++
	case names.Answer.From != netip.AddrPortFrom(own, peer.Port()) || peer.Addr() != l.Source:
		r.WrongPeer++
	case names.Answer.To != to:
		r.WrongName++
	default:
		r.Good++
	}
	return nil
}

func loadSockaddr(domain int, addr netip.AddrPort) unix.Sockaddr {
	if domain == unix.AF_INET {
		return &unix.SockaddrInet4{Addr: addr.Addr().As4(), Port: int(addr.Port())}
	}
	return &unix.SockaddrInet6{Addr: addr.Addr().As16(), Port: int(addr.Port())}
}
