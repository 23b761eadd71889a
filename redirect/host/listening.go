// SPDX-License-Identifier: MPL-2.0

package host

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"unsafe"

	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// Socket is a listening TCP socket as sock_diag tells of it.
type Socket struct {
	Addr   netip.Addr
	Port   uint16
	UID    uint32 // of whoever made it
	Inode  uint32
	Cookie uint64
	family uint8
	V6Only bool
}

// inetDiagRequest is struct inet_diag_req of linux/inet_diag.h. The newer one, inet_diag_req_v2,
// is answered for one family alone, and each answer takes a walk along the listeners of
// all namespaces of the node.
type inetDiagRequest struct {
	_      uint8 // family: both, whatever it is
	_      [3]uint8
	_      [48]byte // socket: any
	states uint32
	_      uint32
}

const tcpdiagGetsock = 18 // TCPDIAG_GETSOCK

// Len and Serialize make it a message of package nl.
func (r *inetDiagRequest) Len() int { return int(unsafe.Sizeof(*r)) }

func (r *inetDiagRequest) Serialize() []byte {
	return append([]byte(nil), (*[unsafe.Sizeof(*r)]byte)(unsafe.Pointer(r))[:]...)
}

// Listening returns the listening TCP sockets of the namespace. It asks for
// that state alone: for any other the kernel walks the connections of all
// namespaces of the node.
func (ns *Namespace) Listening() (found []Socket, err error) {
	err = ns.sockets(1<<unix.BPF_TCP_LISTEN, func(message []byte) error {
		listener, err := parseSocket(message)
		found = append(found, listener)
		return err
	})
	return found, err
}

// sockets calls visit with the inet_diag_msg of every TCP socket of the
// namespace in one of the states, a bit mask of 1<<state.
func (ns *Namespace) sockets(states uint32, visit func(message []byte) error) error {
	return ns.Do(func() error {
		socket, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_INET_DIAG)
		if err != nil {
			return fmt.Errorf("list sockets: %w", err)
		}
		defer socket.Close()
		shared := map[int]*nl.SocketHandle{unix.NETLINK_INET_DIAG: {Socket: socket}}
		request := nl.NewNetlinkRequest(tcpdiagGetsock, unix.NLM_F_DUMP)
		request.Sockets = shared
		request.AddData(&inetDiagRequest{states: states})
		messages, err := request.Execute(unix.NETLINK_INET_DIAG, 0)
		if err != nil {
			return fmt.Errorf("list sockets: %w", err)
		}
		for _, message := range messages {
			if err := visit(message); err != nil {
				return err
			}
		}
		return nil
	})
}

// EncodedInUse returns the indexes that a socket of the namespace carries in
// one of its addresses, whatever its state: TIME_WAIT and SYN_RECV too.
func (ns *Namespace) EncodedInUse() (map[uint32]bool, error) {
	used := make(map[uint32]bool)
	err := ns.sockets(^uint32(0), func(message []byte) error {
		if len(message) < inetDiagSize {
			return fmt.Errorf("list sockets: message of %d bytes", len(message))
		}
		for _, offset := range []int{8, 24} {
			if index, encoded := workload.DecodeIndex(inetDiagAddr(message[0], message[offset:])); encoded {
				used[index] = true
			}
		}
		return nil
	})
	return used, err
}

const inetDiagSize = 72 // of struct inet_diag_msg

func inetDiagAddr(family uint8, field []byte) netip.Addr {
	if family == unix.AF_INET {
		return netip.AddrFrom4([4]byte(field))
	}
	return netip.AddrFrom16([16]byte(field))
}

// parseSocket reads struct inet_diag_msg: family, state, timer, retrans, the
// socket's ID (ports, addresses, interface, cookie), expires, two queues, UID
// and inode, then attributes.
func parseSocket(message []byte) (s Socket, err error) {
	const attrV6Only = 11 // INET_DIAG_SKV6ONLY
	if len(message) < inetDiagSize {
		return s, fmt.Errorf("list listeners: message of %d bytes", len(message))
	}
	s = Socket{
		family: message[0],
		Port:   binary.BigEndian.Uint16(message[4:]),
		Cookie: binary.NativeEndian.Uint64(message[44:]),
		UID:    binary.NativeEndian.Uint32(message[64:]),
		Inode:  binary.NativeEndian.Uint32(message[68:]),
	}
	s.Addr = inetDiagAddr(s.family, message[8:])
	attributes, err := nl.ParseRouteAttr(message[inetDiagSize:])
	if err != nil {
		return s, fmt.Errorf("list listeners: %w", err)
	}
	for _, attribute := range attributes {
		if attribute.Attr.Type == attrV6Only && len(attribute.Value) > 0 {
			s.V6Only = attribute.Value[0] != 0
		}
	}
	return s, nil
}
