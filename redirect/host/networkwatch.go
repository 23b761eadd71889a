// SPDX-License-Identifier: MPL-2.0

package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// NetworkWatch tells when addresses or routes of workloads' namespaces change.
// One socket hears all of them: the kernel hands on what happens in every
// namespace that has a number in the socket's own (NETLINK_LISTEN_ALL_NSID).
type NetworkWatch struct {
	socket *os.File
}

// NewNetworkWatch opens the socket, which hears of the namespaces that have a
// number already.
func NewNetworkWatch() (*NetworkWatch, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("watch networks: %w", err)
	}
	watch := &NetworkWatch{socket: os.NewFile(uintptr(fd), "netlink")}
	err = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_LISTEN_ALL_NSID, 1)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR |
			unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("watch networks: %w", err), watch.socket.Close())
	}
	return watch, nil
}

// Close ends the watch, and Run.
func (w *NetworkWatch) Close() error { return w.socket.Close() }

// Number is that of a workload's namespace as Run names it. One that has none
// gets one.
func (w *NetworkWatch) Number(netns string) (number int32, err error) {
	file, err := os.Open(netns)
	if err != nil {
		return 0, fmt.Errorf("number namespace: %w", err)
	}
	defer file.Close()
	for range 2 {
		found, err := netlink.GetNetNsIdByFd(int(file.Fd()))
		if err != nil {
			return 0, fmt.Errorf("number namespace %s: %w", netns, err)
		}
		if found >= 0 {
			return int32(found), nil
		}
		if err := netlink.SetNetNsIdByFd(int(file.Fd()), -1); err != nil && !errors.Is(err, unix.EEXIST) {
			return 0, fmt.Errorf("number namespace %s: %w", netns, err)
		}
	}
	return 0, fmt.Errorf("number namespace %s: the kernel gives it none", netns)
}

// Run tells the numbers of namespaces that something changed in, until Close;
// with lost, something changed in any of them.
func (w *NetworkWatch) Run(changed func(number int32, lost bool)) error {
	conn, err := w.socket.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch networks: %w", err)
	}
	// What the message says is not read: the kernel throws the rest of it away.
	message, control := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	for {
		var n int
		var received error
		err := conn.Read(func(fd uintptr) bool {
			_, n, _, _, received = unix.Recvmsg(int(fd), message, control, 0)
			return !errors.Is(received, unix.EAGAIN)
		})
		switch {
		case err != nil: // without a deadline it is closed
			return nil
		case errors.Is(received, unix.ENOBUFS):
			changed(0, true)
			continue
		case errors.Is(received, unix.EINTR):
			continue
		case received != nil:
			return fmt.Errorf("watch networks: %w", received)
		}
		// What happens in the socket's own namespace has no number.
		if number, ok := numberOf(control[:n]); ok {
			changed(number, false)
		}
	}
}

func numberOf(control []byte) (number int32, ok bool) {
	list, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return 0, false
	}
	for _, message := range list {
		if message.Header.Level == unix.SOL_NETLINK && message.Header.Type == unix.NETLINK_LISTEN_ALL_NSID && len(message.Data) >= 4 {
			return int32(binary.NativeEndian.Uint32(message.Data)), true
		}
	}
	return 0, false
}
