// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"unsafe"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// socket is a listening TCP socket as sock_diag tells of it.
type socket struct {
	addr   netip.Addr
	port   uint16
	uid    uint32 // of whoever made it
	inode  uint32
	cookie uint64
	family uint8
	v6only bool
}

// inetDiagRequest is struct inet_diag_req_v2 of linux/inet_diag.h.
type inetDiagRequest struct {
	family, protocol, extensions, pad uint8
	states                            uint32
	id                                [48]byte
}

// Len and Serialize make it a message of package nl.
func (r *inetDiagRequest) Len() int { return int(unsafe.Sizeof(*r)) }

func (r *inetDiagRequest) Serialize() []byte {
	return append([]byte(nil), (*[unsafe.Sizeof(*r)]byte)(unsafe.Pointer(r))[:]...)
}

// listening returns the listening TCP sockets of the namespace. It asks for
// that state alone: for any other the kernel walks the connections of all
// namespaces of the node.
func (ns *namespace) listening() (found []socket, err error) {
	err = ns.do(func() error {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			request := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
			request.AddData(&inetDiagRequest{family: family, protocol: unix.IPPROTO_TCP, states: 1 << unix.BPF_TCP_LISTEN})
			messages, err := request.Execute(unix.NETLINK_INET_DIAG, 0)
			if err != nil {
				return fmt.Errorf("list listeners: %w", err)
			}
			for _, message := range messages {
				listener, err := parseSocket(message)
				if err != nil {
					return err
				}
				found = append(found, listener)
			}
		}
		return nil
	})
	return found, err
}

// parseSocket reads struct inet_diag_msg: family, state, timer, retrans, the
// socket's ID (ports, addresses, interface, cookie), expires, two queues, UID
// and inode, then attributes.
func parseSocket(message []byte) (s socket, err error) {
	const (
		size       = 72
		attrV6Only = 11 // INET_DIAG_SKV6ONLY
	)
	if len(message) < size {
		return s, fmt.Errorf("list listeners: message of %d bytes", len(message))
	}
	s = socket{
		family: message[0],
		port:   binary.BigEndian.Uint16(message[4:]),
		cookie: binary.NativeEndian.Uint64(message[44:]),
		uid:    binary.NativeEndian.Uint32(message[64:]),
		inode:  binary.NativeEndian.Uint32(message[68:]),
	}
	if s.family == unix.AF_INET {
		s.addr = netip.AddrFrom4([4]byte(message[8:]))
	} else {
		s.addr = netip.AddrFrom16([16]byte(message[8:]))
	}
	attributes, err := nl.ParseRouteAttr(message[size:])
	if err != nil {
		return s, fmt.Errorf("list listeners: %w", err)
	}
	for _, attribute := range attributes {
		if attribute.Attr.Type == attrV6Only && len(attribute.Value) > 0 {
			s.v6only = attribute.Value[0] != 0
		}
	}
	return s, nil
}

// roles is the test that weir_sockops makes on a new listener: which roles of
// the workload's proxy it can serve.
func (s socket) roles(w Workload) (roles []bpfListenerRole) {
	outbound := s.port == w.OutboundPort
	if !outbound && s.port != w.InboundPort {
		return nil
	}
	mapped := s.addr.Is4() || s.addr.Is4In6()
	take4 := mapped || s.addr.IsUnspecified() && !s.v6only
	addr := s.addr.Unmap()
	if outbound && !addr.IsUnspecified() && addr != netip.AddrFrom4([4]byte{127, 0, 0, 1}) && addr != netip.IPv6Loopback() {
		return nil
	}
	four, six := bpfListenerRoleLISTENER_INBOUND4, bpfListenerRoleLISTENER_INBOUND6
	if outbound {
		four, six = bpfListenerRoleLISTENER_OUTBOUND4, bpfListenerRoleLISTENER_OUTBOUND6
	}
	if take4 {
		roles = append(roles, four)
	}
	if !mapped {
		roles = append(roles, six)
	}
	return roles
}
