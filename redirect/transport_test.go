// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"testing"

	"github.com/weirmesh/weir/redirect/monitor"
	"golang.org/x/sys/unix"
)

func TestTransportOf(t *testing.T) {
	for want, socket := range map[string][3]uint16{
		"udp": {0, 0, unix.IPPROTO_UDP}, "tcp": {0, 0, unix.IPPROTO_TCP}, "icmp": {unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_ICMP},
		"raw icmpv6": {unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6}, "raw protocol 255": {unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW},
		"packet": {unix.AF_PACKET, unix.SOCK_RAW, 8}, "vsock": {unix.AF_VSOCK, unix.SOCK_STREAM, 0}, "family 30": {unix.AF_TIPC, unix.SOCK_RDM, 0},
	} {
		if got := monitor.TransportOf(socket[0], socket[1], socket[2]); got != want {
			t.Errorf("transport of %v is %q, want %q", socket, got, want)
		}
	}
}
