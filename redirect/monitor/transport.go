// SPDX-License-Identifier: MPL-2.0

package monitor

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// TransportOf names what a socket sends by. Without a family it is one of IP that
// sends or connects.
func TransportOf(family, socketType, protocol uint16) string {
	switch family {
	case 0, unix.AF_INET, unix.AF_INET6:
	case unix.AF_PACKET:
		return "packet"
	case unix.AF_VSOCK:
		return "vsock"
	case unix.AF_XDP:
		return "xdp"
	default:
		return fmt.Sprintf("family %d", family)
	}
	name, known := map[uint16]string{
		unix.IPPROTO_TCP: "tcp", unix.IPPROTO_MPTCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_UDPLITE: "udp-lite", unix.IPPROTO_ICMP: "icmp",
		unix.IPPROTO_ICMPV6: "icmpv6", unix.IPPROTO_SCTP: "sctp", unix.IPPROTO_DCCP: "dccp",
	}[protocol]
	if !known {
		name = fmt.Sprintf("protocol %d", protocol)
	}
	if socketType == unix.SOCK_RAW {
		return "raw " + name
	}
	return name
}
