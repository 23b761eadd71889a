// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// A socket that is bound to an address of others (IP_FREEBIND needs no privilege)
// is refused: the answer of the proxy, or of the task's own listener, would go there
// and be the beginning of a connection past the proxy.
func TestFreebindIsRefused(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.outbound = a.serve(proxyUID, a.proxyCg, "tcp4", outboundListener)
	a.serve(proxyUID, a.proxyCg, "tcp6", "[::1]:15001")
	a.serve(taskUID, a.taskCg, "tcp", "[::]:9000")
	test.Echo(t, n.remote, "tcp", "[::]:8080")
	// From here on packets leave at once: the neighbours are known.
	known := a.actor(t, proxyUID, a.proxyCg)
	for _, dial := range []string{far4, far6} {
		known.run(t, stream(unix.AF_INET6).connect(dial).ask(""))
	}
	p := a.actor(t, 0, a.taskCg) // IP_TRANSPARENT needs CAP_NET_ADMIN
	before := segments(t, n.remote)
	wire := capturePackets(t, n.remote, "veth1")
	for _, tc := range []struct {
		name   string
		script script
	}{
		{"IPv4", stream(unix.AF_INET).set(unix.SOL_IP, unix.IP_FREEBIND, 1).bind("198.51.100.7:0").
			to("connectStart", somewhere).fails(unix.ENETUNREACH)},
		{"IPv6", stream(unix.AF_INET6).set(unix.SOL_IPV6, unix.IPV6_FREEBIND, 1).bind("[2001:db8:66::1]:0").
			to("connectStart", elsewhere6).fails(unix.ENETUNREACH)},
		{"IPv6 to loopback", stream(unix.AF_INET6).set(unix.SOL_IPV6, unix.IPV6_FREEBIND, 1).bind("[2001:db8:66::1]:0").
			to("connectStart", "[::1]:9000").fails(unix.ENETUNREACH)},
		{"IPv6 to the own address", stream(unix.AF_INET6).set(unix.SOL_IPV6, unix.IPV6_FREEBIND, 1).bind("[2001:db8:66::1]:0").
			to("connectStart", addrPort(a.v6, 9000)).fails(unix.ENETUNREACH)},
		{"IPv6 of the own network", stream(unix.AF_INET6).set(unix.SOL_IPV6, unix.IPV6_FREEBIND, 1).bind("[fd09:1::77]:0").
			to("connectStart", addrPort(a.v6, 9000)).fails(unix.ENETUNREACH)},
		{"mapped", stream(unix.AF_INET6).set(unix.SOL_IP, unix.IP_FREEBIND, 1).bind("[::ffff:198.51.100.7]:0").
			to("connectStart", "[::ffff:192.0.2.77]:8080").fails(unix.ENETUNREACH)},
		{"IPv4, transparent", stream(unix.AF_INET).set(unix.SOL_IP, unix.IP_TRANSPARENT, 1).bind("198.51.100.7:0").
			to("connectStart", somewhere).fails(unix.ENETUNREACH)},
		{"IPv6, transparent", stream(unix.AF_INET6).set(unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1).bind("[2001:db8:66::1]:0").
			to("connectStart", elsewhere6).fails(unix.ENETUNREACH)},
		{"mapped, transparent", stream(unix.AF_INET6).set(unix.SOL_IP, unix.IP_TRANSPARENT, 1).bind("[::ffff:198.51.100.7]:0").
			to("connectStart", "[::ffff:192.0.2.77]:8080").fails(unix.ENETUNREACH)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedSource: 1}, func() { p.run(t, tc.script) })
		})
	}
	if found := wire.seen(); len(found) > 0 {
		t.Errorf("packets left from or for %v", found)
	}
	if now := segments(t, n.remote); now != before {
		t.Errorf("%d segments reached the remote", now-before)
	}
}
