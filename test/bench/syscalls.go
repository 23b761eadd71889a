// SPDX-License-Identifier: MPL-2.0

package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls of the measured paths bypass Go's scheduler and network poller: a
// thread that waits in the kernel keeps its processor, nothing hands it over.
// Workers therefore run with the collector and asynchronous preemption off,
// which also means that no signal interrupts a call.

func result(n uintptr, errno unix.Errno) (int, error) {
	if errno != 0 {
		return -1, errno
	}
	return int(n), nil
}

func tcpSocket(flags int) (int, error) {
	fd, _, errno := unix.RawSyscall(unix.SYS_SOCKET, unix.AF_INET, uintptr(unix.SOCK_STREAM|unix.SOCK_CLOEXEC|flags), 0)
	return result(fd, errno)
}

func closeFD(fd int) { unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

func connectTo(fd int, to *unix.RawSockaddrInet4) error {
	n, _, errno := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(to)), unix.SizeofSockaddrInet4)
	_, err := result(n, errno)
	return err
}

func readFD(fd int, buffer []byte) (int, error) {
	n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&buffer[0])), uintptr(len(buffer)))
	return result(n, errno)
}

// readAll reads exactly len(buffer) bytes.
func readAll(fd int, buffer []byte) error {
	for len(buffer) > 0 {
		n, err := readFD(fd, buffer)
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		buffer = buffer[n:]
	}
	return nil
}

// writeAll writes all of buffer; a short write is an error.
func writeAll(fd int, buffer []byte) error {
	n, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&buffer[0])), uintptr(len(buffer)))
	if _, err := result(n, errno); err != nil {
		return err
	}
	if int(n) != len(buffer) {
		return io.ErrShortWrite
	}
	return nil
}

// acceptFrom accepts one connection, non-blocking.
func acceptFrom(listener int) (int, error) {
	fd, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(listener), 0, 0, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	return result(fd, errno)
}

// originOf asks for SO_ORIGINAL_DST, which every proxy of a mesh asks for.
func originOf(fd int, origin *unix.RawSockaddrInet4) error {
	size := uint32(unix.SizeofSockaddrInet4)
	n, _, errno := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_IP, unix.SO_ORIGINAL_DST,
		uintptr(unsafe.Pointer(origin)), uintptr(unsafe.Pointer(&size)), 0)
	_, err := result(n, errno)
	return err
}

func socketError(fd int) error {
	var value int32
	size := uint32(unsafe.Sizeof(value))
	n, _, errno := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_ERROR,
		uintptr(unsafe.Pointer(&value)), uintptr(unsafe.Pointer(&size)), 0)
	_, err := result(n, errno)
	return err
}

func peerName(fd int, peer *unix.RawSockaddrInet4) error {
	size := uint32(unix.SizeofSockaddrInet4)
	n, _, errno := unix.RawSyscall(unix.SYS_GETPEERNAME, uintptr(fd), uintptr(unsafe.Pointer(peer)), uintptr(unsafe.Pointer(&size)))
	_, err := result(n, errno)
	return err
}

func setNoDelay(fd int) error {
	return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
}

// waitFor blocks until one of an epoll set's descriptors is ready.
func waitFor(epoll int, events []unix.EpollEvent) ([]unix.EpollEvent, error) {
	forever := -1
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(epoll), uintptr(unsafe.Pointer(&events[0])),
		uintptr(len(events)), uintptr(forever), 0, 0)
	if _, err := result(n, errno); err != nil {
		return nil, err
	}
	return events[:n], nil
}

// watch adds fd to an epoll set, level-triggered.
func watch(epoll, fd int) error {
	event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(epoll), unix.EPOLL_CTL_ADD, uintptr(fd),
		uintptr(unsafe.Pointer(&event)), 0, 0)
	_, err := result(n, errno)
	return err
}

func sockaddr(to netip.AddrPort) *unix.RawSockaddrInet4 {
	sa := &unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: to.Addr().As4()}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&sa.Port))[:], to.Port())
	return sa
}

func nameOf(sa *unix.RawSockaddrInet4) netip.AddrPort {
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&sa.Port))[:])
	return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), port)
}

// cpuTime is what this process has used, user and kernel.
func cpuTime() (time.Duration, error) {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		return 0, fmt.Errorf("get resource usage: %w", err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano()), nil
}
