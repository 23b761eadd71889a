// SPDX-License-Identifier: MPL-2.0

package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Answer is what a dialler saw of an exchange with a [Server].
type Answer struct {
	Reply
	// From is the dialler's own address, To what getpeername told it.
	From netip.AddrPort `json:"from"`
	To   netip.AddrPort `json:"to"`
}

// dialPatience bounds one exchange. It is only spent where packets are lost: a
// refusal comes at once.
const dialPatience = 3 * time.Second

// Waiting, behind a network's name, lets a dial go on through several retransmissions.
const Waiting = "+wait"

const waitingPatience = time.Minute

// Ask dials addr from the namespace, as the test's own process, and returns what
// the server answered. Network is tcp or udp, with 4 or 6 for one family, and with
// Waiting for a dial that is not to be answered at once.
func Ask(ns *NetNS, network, addr string) (Answer, error) {
	var answer Answer
	var err error
	ns.Do(func() { answer, err = ask(network, addr) })
	return answer, err
}

// DialErr returns why no TCP connection to a [Server] at addr can be had from the
// namespace, or nil.
func DialErr(tb testing.TB, ns *NetNS, addr string) error {
	tb.Helper()
	_, err := Ask(ns, "tcp", addr)
	return err
}

// CanDial tells if a [Server] at addr answers a TCP connection from the namespace.
func CanDial(tb testing.TB, ns *NetNS, addr string) bool {
	tb.Helper()
	return DialErr(tb, ns, addr) == nil
}

func ask(network, addr string) (Answer, error) {
	var answer Answer
	network, waiting := strings.CutSuffix(network, Waiting)
	dialer := net.Dialer{Timeout: dialPatience}
	if waiting {
		dialer.Timeout = waitingPatience
	}
	conn, err := dialer.Dial(network, addr)
	if err != nil {
		return answer, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(dialPatience)); err != nil {
		return answer, err
	}
	if strings.HasPrefix(network, "udp") {
		if _, err := conn.Write([]byte("?")); err != nil {
			return answer, err
		}
	}
	if err := json.NewDecoder(conn).Decode(&answer.Reply); err != nil {
		return answer, fmt.Errorf("read reply of %s: %w", addr, err)
	}
	if answer.From, err = addrPort(conn.LocalAddr()); err != nil {
		return answer, err
	}
	answer.To, err = addrPort(conn.RemoteAddr())
	return answer, err
}

// AskAgain asks the [Server] at the other end of an open connection what it sees
// now, SO_ORIGINAL_DST among it, and the kernel what getpeername says now.
func AskAgain(conn *net.TCPConn) (Answer, error) {
	var answer Answer
	if err := conn.SetDeadline(time.Now().Add(dialPatience)); err != nil {
		return answer, err
	}
	if _, err := conn.Write([]byte(enquiry)); err != nil {
		return answer, err
	}
	if err := json.NewDecoder(conn).Decode(&answer.Reply); err != nil {
		return answer, fmt.Errorf("read second reply: %w", err)
	}
	var err error
	if answer.From, err = addrPort(conn.LocalAddr()); err != nil {
		return answer, err
	}
	answer.To, err = peer(conn)
	return answer, err
}

// peer asks the kernel; RemoteAddr is what the library was told once.
func peer(conn *net.TCPConn) (addr netip.AddrPort, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return addr, err
	}
	var peerErr error
	err = raw.Control(func(fd uintptr) {
		var name unix.Sockaddr
		name, peerErr = unix.Getpeername(int(fd))
		switch name := name.(type) {
		case *unix.SockaddrInet4:
			addr = netip.AddrPortFrom(netip.AddrFrom4(name.Addr), uint16(name.Port))
		case *unix.SockaddrInet6:
			addr = unmap(netip.AddrPortFrom(netip.AddrFrom16(name.Addr), uint16(name.Port)))
		}
	})
	return addr, errors.Join(err, peerErr)
}

func addrPort(addr net.Addr) (netip.AddrPort, error) {
	parsed, err := netip.ParseAddrPort(addr.String())
	return unmap(parsed), err
}
