// SPDX-License-Identifier: MPL-2.0

package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// A serveSpec tells a worker to be the proxy: one thread, an epoll loop, and
// SO_ORIGINAL_DST asked for on every accept.
type serveSpec struct {
	Listen []netip.AddrPort
	Origin netip.AddrPort // the only right answer
	Sink   bool           // count until the peer's half close, then answer with the count; else echo
}

// A serveReport says what a server has done since it started.
type serveReport struct {
	CPU      time.Duration
	Right    int            // connections whose origin was Origin
	None     int            // connections without an origin: they were not redirected
	Wrong    int            // connections with another origin
	WrongOne netip.AddrPort // one of those
}

type server struct {
	spec      serveSpec
	report    serveReport
	origin    unix.RawSockaddrInet4
	epoll     int
	listeners map[int]bool
	received  map[int]uint64 // sink: bytes by connection
	buffer    []byte
}

// serve listens, says so on out, then serves until control ends. A byte on
// control asks for a report.
func serve(spec serveSpec, control int, out io.Writer) error {
	runtime.LockOSThread()
	s := &server{
		spec:      spec,
		origin:    *sockaddr(spec.Origin),
		listeners: map[int]bool{},
		received:  map[int]uint64{},
		buffer:    make([]byte, 256<<10),
	}
	var err error
	if s.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("create epoll set: %w", err)
	}
	for _, addr := range spec.Listen {
		fd, err := listen(addr)
		if err != nil {
			return err
		}
		s.listeners[fd] = true
		if err := watch(s.epoll, fd); err != nil {
			return fmt.Errorf("watch listener: %w", err)
		}
	}
	if err := watch(s.epoll, control); err != nil {
		return fmt.Errorf("watch control: %w", err)
	}
	answers := json.NewEncoder(out)
	if err := answers.Encode(s.report); err != nil {
		return err
	}
	events := make([]unix.EpollEvent, 64)
	for {
		ready, err := waitFor(s.epoll, events)
		if err != nil {
			return fmt.Errorf("wait for connections: %w", err)
		}
		for _, event := range ready {
			fd := int(event.Fd)
			switch {
			case s.listeners[fd]:
				err = s.accept(fd)
			case fd == control:
				if n, err := readFD(control, s.buffer[:1]); n != 1 {
					return err
				}
				if s.report.CPU, err = cpuTime(); err == nil {
					err = answers.Encode(s.report)
				}
			default:
				err = s.answer(fd)
			}
			if err != nil {
				return err
			}
		}
	}
}

func listen(addr netip.AddrPort) (int, error) {
	fd, err := tcpSocket(unix.SOCK_NONBLOCK)
	if err != nil {
		return -1, fmt.Errorf("open socket: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return -1, fmt.Errorf("set SO_REUSEADDR: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}); err != nil {
		return -1, fmt.Errorf("bind %s: %w", addr, err)
	}
	if err := unix.Listen(fd, 4096); err != nil {
		return -1, fmt.Errorf("listen on %s: %w", addr, err)
	}
	return fd, nil
}

func (s *server) accept(listener int) error {
	fd, err := acceptFrom(listener)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ECONNABORTED) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("accept: %w", err)
	}
	var origin unix.RawSockaddrInet4
	err = originOf(fd, &origin)
	switch {
	case err != nil:
		s.report.None++
	case origin.Port == s.origin.Port && origin.Addr == s.origin.Addr:
		s.report.Right++
	default:
		s.report.Wrong++
		s.report.WrongOne = nameOf(&origin)
	}
	if err := watch(s.epoll, fd); err != nil {
		return fmt.Errorf("watch connection: %w", err)
	}
	return s.answer(fd)
}

// answer reads what a connection has and answers it. A peer that resets its
// connection is no error of the server's.
func (s *server) answer(fd int) error {
	n, err := readFD(fd, s.buffer)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return nil
	case err != nil:
		closeFD(fd)
		return nil
	case s.spec.Sink && n > 0:
		s.received[fd] += uint64(n)
		return nil
	case s.spec.Sink:
		count := binary.LittleEndian.AppendUint64(nil, s.received[fd])
		delete(s.received, fd)
		err := writeAll(fd, count)
		closeFD(fd)
		return err
	case n == 0:
		closeFD(fd)
		return nil
	}
	if err := writeAll(fd, s.buffer[:n]); err != nil {
		return fmt.Errorf("echo %d bytes: %w", n, err)
	}
	return nil
}
