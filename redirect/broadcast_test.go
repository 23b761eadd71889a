// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"net/netip"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// TCP to many is ENETUNREACH, as the kernel says without a mesh, and takes no
// index from the workload.
func TestBroadcastIsRefused(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) {
		r.ExcludeOutboundPorts = []uint16{25}
		r.ExcludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("239.0.0.0/8")}
	})
	a.startProxy()
	p := a.task(t)
	for _, tc := range []struct {
		name   string
		domain int
		dial   string
		want   bpfmap.Verdict
	}{
		{"multicast", unix.AF_INET, "224.0.0.1:80", bpfmap.RefusedBroadcast},
		{"last multicast", unix.AF_INET, "238.255.255.255:80", bpfmap.RefusedBroadcast},
		{"broadcast", unix.AF_INET, "255.255.255.255:80", bpfmap.RefusedBroadcast},
		{"of the network", unix.AF_INET, "10.9.1.255:80", bpfmap.RefusedBroadcast},
		{"of the network, mapped", unix.AF_INET6, "[::ffff:10.9.1.255]:80", bpfmap.RefusedBroadcast},
		{"mapped", unix.AF_INET6, "[::ffff:224.0.0.251]:80", bpfmap.RefusedBroadcast},
		{"IPv6 multicast", unix.AF_INET6, "[ff02::1]:80", bpfmap.RefusedBroadcast},
		{"IPv6 multicast of the site", unix.AF_INET6, "[ff0e::1]:80", bpfmap.RefusedBroadcast},
		{"excluded port", unix.AF_INET, "10.9.1.255:25", bpfmap.PortExcluded},
		{"excluded CIDR", unix.AF_INET, "239.1.1.1:80", bpfmap.CIDRExcluded},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a.moves(t, map[bpfmap.Verdict]uint64{tc.want: 1}, func() {
				p.run(t, stream(tc.domain).connect(tc.dial).fails(unix.ENETUNREACH))
			})
		})
	}
	if rows := rowCounts(t, n.Datapath)["origins"]; rows != 0 {
		t.Errorf("%d origins, want none", rows)
	}
	// What lies beside them is for the proxy: the reserved range has virtual IPs.
	for _, dial := range []string{"223.255.255.255:80", "240.0.0.1:80", "255.255.255.254:80", "10.9.1.254:80", "10.9.2.255:80"} {
		a.proxied(t, p, stream(unix.AF_INET).connect(dial).ask(""), dial, a.v4)
	}
}

// A network's broadcast address is what the network says, and changes with it.
func TestBroadcastOfAnotherAddress(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) { r.Mode = workload.ModeDirect })
	p := a.task(t)
	a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.Direct: 1}, func() {
		p.run(t, stream(unix.AF_INET).connect("10.9.1.255:80").fails(unix.ENETUNREACH))
	})
}

// The own address of an IPv6 connection is an IPv6 address, also where the proxy
// is on IPv4 and sees the IPv4 one.
func TestOwnNameOfIPv6(t *testing.T) {
	a := proxiedAlloc(t)
	p := a.task(t)
	for _, protocol := range []int{unix.IPPROTO_TCP, unix.IPPROTO_MPTCP} {
		got := p.last(t, script(nil).open(unix.AF_INET6, protocol).connect(elsewhere6).names()).Answer
		if got.From.Addr() != a.v6 || got.To.String() != elsewhere6 {
			t.Errorf("protocol %d: getsockname %s, getpeername %s; want %s and %s", protocol, got.From, got.To, a.v6, elsewhere6)
		}
		mapped := p.last(t, script(nil).open(unix.AF_INET6, protocol).connect("[::ffff:192.0.2.77]:8080").names()).Answer
		if mapped.From.Addr() != a.v4 || mapped.To.String() != somewhere {
			t.Errorf("protocol %d, mapped: getsockname %s, getpeername %s; want %s and %s", protocol, mapped.From, mapped.To, a.v4, somewhere)
		}
	}
}
