// SPDX-License-Identifier: MPL-2.0

package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"unsafe"

	"github.com/vishvananda/netlink/nl"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// Where a holder listens: on addresses of loopback that nobody uses, and a port above
// those that the kernel and Nomad give out, so that it is in nobody's way and needs no
// CAP_NET_BIND_SERVICE. There are several, because an agent that begins may find its
// predecessor's.
const (
	holderPort  = 65535
	holderPlace = 254 // 127.127.255.254, and down
	holders     = 8
)

// Holder makes a TCP listener in the namespace that answers nobody: a socket filter
// (SO_ATTACH_FILTER) drops each segment before the listener sees it. Whoever is
// steered to it sends its SYN again after a second, and again, as if it had been
// lost on the way. The caller closes the file. It keeps the namespace alive.
func (ns *Namespace) Holder() (file *os.File, err error) {
	err = ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("open socket: %w", err)
		}
		file = os.NewFile(uintptr(fd), "holder")
		nothing := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0}
		err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &nothing})
		if err != nil {
			return fmt.Errorf("attach socket filter: %w", err)
		}
		for place := range byte(holders) {
			err = unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 127, 255, holderPlace - place}, Port: holderPort})
			if !errors.Is(err, unix.EADDRINUSE) {
				break
			}
		}
		if err != nil {
			return fmt.Errorf("bind: %w", err)
		}
		if err := unix.Listen(fd, 1); err != nil {
			return fmt.Errorf("listen: %w", err)
		}
		return nil
	})
	if err != nil {
		if file != nil {
			err = errors.Join(err, file.Close())
		}
		return nil, fmt.Errorf("make a listener that holds connections: %w", err)
	}
	return file, nil
}

// Drops is how many segments a holder has dropped: each is a SYN of somebody who waits.
func Drops(holder *os.File) (uint32, error) {
	var info [9]uint32 // SK_MEMINFO_VARS
	const drops = 8    // SK_MEMINFO_DROPS (Linux 4.12)
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, holder.Fd(), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, fmt.Errorf("read what a holder dropped: %w", errno)
	}
	return info[drops], nil
}

// Attempt is a connection that was not answered yet.
type Attempt struct {
	Source, Destination netip.AddrPort
	UID                 uint32
	Cgroup              uint64
}

// Waiting returns the connections to the encoded range or to loopback that were not
// answered yet, by the cookies of their sockets.
func (ns *Namespace) Waiting() (map[uint64]Attempt, error) {
	const attrCgroup = 21 // INET_DIAG_CGROUP_ID
	waiting := make(map[uint64]Attempt)
	err := ns.sockets(1<<unix.BPF_TCP_SYN_SENT, func(message []byte) error {
		if len(message) < inetDiagSize {
			return fmt.Errorf("list sockets: message of %d bytes", len(message))
		}
		to := inetDiagAddr(message[0], message[24:])
		if _, encoded := workload.DecodeIndex(to); !encoded && !to.Unmap().IsLoopback() {
			return nil
		}
		attempt := Attempt{
			Source:      netip.AddrPortFrom(inetDiagAddr(message[0], message[8:]).Unmap(), binary.BigEndian.Uint16(message[4:])),
			Destination: netip.AddrPortFrom(to.Unmap(), binary.BigEndian.Uint16(message[6:])),
			UID:         binary.NativeEndian.Uint32(message[64:]),
		}
		attributes, err := nl.ParseRouteAttr(message[inetDiagSize:])
		if err != nil {
			return fmt.Errorf("list sockets: %w", err)
		}
		for _, attribute := range attributes {
			if attribute.Attr.Type == attrCgroup && len(attribute.Value) >= 8 {
				attempt.Cgroup = binary.NativeEndian.Uint64(attribute.Value)
			}
		}
		waiting[binary.NativeEndian.Uint64(message[44:])] = attempt
		return nil
	})
	return waiting, err
}
