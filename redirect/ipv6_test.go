// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// The addresses of the remote in the network of the first allocation, as a
// socket of either family dials them. The remote listens there: an answer of
// its own means that a connection passed the mesh.
const (
	far4       = "10.9.1.1:8080"
	farMapped  = "[::ffff:10.9.1.1]:8080"
	far6       = "[fd09:1::1]:8080"
	elsewhere6 = "[2001:db8:7::1]:443"
)

// familyCase is a connection, and what becomes of it. The origin is what is
// dialled.
type familyCase struct {
	name   string
	script script
	want   bpfmap.Verdict
	source netip.Addr // that the proxy sees; not valid where it sees nothing
}

// families runs the cases as a task. The answers are of the allocation's
// outbound listener, or of `six` where the proxy is to see an IPv6 address.
func (a *alloc) families(t *testing.T, six *test.ServerProcess, cases []familyCase) {
	t.Helper()
	test.Echo(t, a.node.remote, "tcp", "[::]:8080")
	before := segments(t, a.node.remote)
	p := a.task(t)
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			origin := unmapped(tc.script[len(tc.script)-1].Addr)
			a.moves(t, map[bpfmap.Verdict]uint64{tc.want: 1}, func() {
				if tc.want.Refused() {
					p.run(t, tc.script.fails(unix.ENETUNREACH))
					return
				}
				got := p.last(t, tc.script.ask("")).Answer
				seen := *a
				if tc.source.Is6() && six != nil {
					seen.outbound = six
				}
				seen.answered(got, nil, origin, tc.source)
			})
		})
	}
	if after := segments(t, a.node.remote); after != before {
		t.Errorf("%d segments reached the remote: they passed the mesh", after-before)
	}
}

// segments is how many TCP segments the namespace received.
func segments(t *testing.T, ns *test.NetNS) (count uint64) {
	t.Helper()
	ns.Do(func() {
		table, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			t.Fatal(err)
		}
		// Two lines begin with Tcp: the names and the values.
		var names []string
		for line := range strings.Lines(string(table)) {
			fields := strings.Fields(line)
			if fields[0] != "Tcp:" {
				continue
			}
			if names == nil {
				names = fields
				continue
			}
			if count, err = strconv.ParseUint(fields[slices.Index(names, "InSegs")], 10, 64); err != nil {
				t.Fatal(err)
			}
		}
	})
	return count
}

func only6() script { return stream(unix.AF_INET6).set(unix.SOL_IPV6, unix.IPV6_V6ONLY, 1) }

func dualStack() script { return stream(unix.AF_INET6) }

func (a *alloc) boundTo6(port int) script {
	return dualStack().bind(addrPort(a.v6, uint16(port)))
}

func (a *alloc) boundToMapped() script {
	return dualStack().bind(fmt.Sprintf("[::ffff:%s]:0", a.v4))
}

// A proxy on IPv4, as Consul configures it, takes IPv6 from every socket that
// can speak both.
func TestIPv6ProxyOnIPv4(t *testing.T) {
	a := proxiedAlloc(t)
	mptcp6 := script(nil).open(unix.AF_INET6, unix.IPPROTO_MPTCP).set(unix.SOL_IPV6, unix.IPV6_V6ONLY, 1)
	a.families(t, nil, []familyCase{
		{"IPv4", stream(unix.AF_INET).connect(far4), bpfmap.Redirected, a.v4},
		{"mapped", dualStack().connect(farMapped), bpfmap.Redirected, a.v4},
		{"native", dualStack().connect(far6), bpfmap.Redirected, a.v4},
		{"native, no route", dualStack().connect(elsewhere6), bpfmap.Redirected, a.v4},
		{"native, non-blocking", dualStack().to("connectLater", far6), bpfmap.Redirected, a.v4},
		{"native, bound to any", dualStack().bind("[::]:4001").connect(far6), bpfmap.Redirected, a.v4},
		{"native, bound to mapped", a.boundToMapped().connect(far6), bpfmap.Redirected, a.v4},
		{"V6ONLY", only6().connect(far6), bpfmap.RefusedFamily, netip.Addr{}},
		{"V6ONLY, fast open", only6().to("connectByData", far6).data("hello"), bpfmap.RefusedFamily, netip.Addr{}},
		{"V6ONLY, MPTCP", mptcp6.connect(far6), bpfmap.RefusedFamily, netip.Addr{}},
		{"bound to IPv6", a.boundTo6(0).connect(far6), bpfmap.RefusedFamily, netip.Addr{}},
		{"bound to IPv6 and a port", a.boundTo6(4002).connect(far6), bpfmap.RefusedFamily, netip.Addr{}},
		{"bound to loopback", dualStack().bind("[::1]:0").connect(far6), bpfmap.RefusedFamily, netip.Addr{}},
	})
}

// proxyOn6 is what becomes of a connection where the proxy is on IPv6 alone.
func (a *alloc) proxyOn6() []familyCase {
	return []familyCase{
		{"IPv4", stream(unix.AF_INET).connect(far4), bpfmap.RefusedFamily, netip.Addr{}},
		{"IPv4, bound", stream(unix.AF_INET).bind(addrPort(a.v4, 0)).connect(far4), bpfmap.RefusedFamily, netip.Addr{}},
		{"mapped", dualStack().connect(farMapped), bpfmap.Redirected, a.v6},
		{"mapped, bound to mapped", a.boundToMapped().connect(farMapped), bpfmap.RefusedFamily, netip.Addr{}},
		{"native", dualStack().connect(far6), bpfmap.Redirected, a.v6},
		{"native, no route", dualStack().connect(elsewhere6), bpfmap.Redirected, a.v6},
		{"native, MPTCP", script(nil).open(unix.AF_INET6, unix.IPPROTO_MPTCP).connect(far6), bpfmap.Redirected, a.v6},
		{"V6ONLY", only6().connect(far6), bpfmap.Redirected, a.v6},
		{"bound to IPv6", a.boundTo6(0).connect(far6), bpfmap.Redirected, a.v6},
		{"bound to IPv6 and a port", a.boundTo6(4002).connect(far6), bpfmap.Redirected, a.v6},
		{"bound to loopback", dualStack().bind("[::1]:0").connect(far6), bpfmap.Redirected, netip.IPv6Loopback()},
	}
}

// proxyOnBoth is the same where it is on both families.
func (a *alloc) proxyOnBoth() []familyCase {
	return []familyCase{
		{"IPv4", stream(unix.AF_INET).connect(far4), bpfmap.Redirected, a.v4},
		{"mapped", dualStack().connect(farMapped), bpfmap.Redirected, a.v4},
		{"mapped, bound to mapped", a.boundToMapped().connect(farMapped), bpfmap.Redirected, a.v4},
		{"native", dualStack().connect(far6), bpfmap.Redirected, a.v6},
		{"native, bound to mapped", a.boundToMapped().connect(far6), bpfmap.Redirected, a.v4},
		{"V6ONLY", only6().connect(far6), bpfmap.Redirected, a.v6},
		{"bound to IPv6", a.boundTo6(0).connect(far6), bpfmap.Redirected, a.v6},
	}
}

func TestIPv6ProxyOnIPv6(t *testing.T) {
	for name, listener := range map[string]struct{ network, addr string }{
		"loopback":    {"tcp6", "[::1]:15001"},
		"any, V6ONLY": {"tcp6", "[::]:15001"}, // what Envoy makes of [::] by default
	} {
		t.Run(name, func(t *testing.T) {
			a := newNode(t).newAlloc()
			a.add()
			a.outbound = a.serve(proxyUID, a.proxyCg, listener.network, listener.addr)
			a.families(t, nil, a.proxyOn6())
		})
	}
}

func TestIPv6ProxyOnDualStack(t *testing.T) {
	a := newNode(t).newAlloc()
	a.add()
	a.outbound = a.serve(proxyUID, a.proxyCg, "tcp", "[::]:15001")
	a.families(t, nil, a.proxyOnBoth())
}

func TestIPv6ProxyOnTwoListeners(t *testing.T) {
	a := newNode(t).newAlloc()
	a.add()
	a.outbound = a.serve(proxyUID, a.proxyCg, "tcp4", "127.0.0.1:15001")
	a.families(t, a.serve(proxyUID, a.proxyCg, "tcp6", "[::1]:15001"), a.proxyOnBoth())
}

// A proxy that comes back with a listener of another family is taken as it is
// now.
func TestIPv6ProxyChangesItsFamily(t *testing.T) {
	a := newNode(t).newAlloc()
	a.add()
	for _, addr := range []string{"[::1]:15001", "127.0.0.1:15001", "[::1]:15001"} {
		a.outbound = a.serve(proxyUID, a.proxyCg, "tcp", addr)
		six := netip.MustParseAddrPort(addr).Addr().Is6()
		v4, v6, source := bpfmap.Redirected, bpfmap.RefusedFamily, a.v4
		if six {
			v4, v6, source = bpfmap.RefusedFamily, bpfmap.Redirected, a.v6
		}
		t.Run(addr, func(t *testing.T) {
			a.families(t, nil, []familyCase{
				{"IPv4", stream(unix.AF_INET).connect(far4), v4, a.v4},
				{"mapped", dualStack().connect(farMapped), bpfmap.Redirected, source},
				{"native", dualStack().connect(far6), bpfmap.Redirected, source},
				{"V6ONLY", only6().connect(far6), v6, a.v6},
			})
		})
		a.outbound.Stop()
	}
	before := segments(t, a.node.remote)
	p := a.task(t)
	for _, s := range []script{stream(unix.AF_INET).connect(far4), dualStack().connect(far6)} {
		a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedNoProxy: 1}, func() { p.run(t, s.fails(unix.ECONNREFUSED)) })
	}
	if after := segments(t, a.node.remote); after != before {
		t.Errorf("%d segments reached the remote without a proxy", after-before)
	}
}

// Where the namespace has no IPv6, a dual-stack socket still takes any origin.
func TestIPv6Disabled(t *testing.T) {
	a := newNode(t).newAlloc()
	setSysctlIn(t, a.NetNS, "ipv6/conf/all/disable_ipv6", "1")
	a.add()
	a.v6 = netip.Addr{} // it has none
	a.startProxy()
	a.families(t, nil, []familyCase{
		{"IPv4", stream(unix.AF_INET).connect(far4), bpfmap.Redirected, a.v4},
		{"mapped", dualStack().connect(farMapped), bpfmap.Redirected, a.v4},
		{"native", dualStack().connect(far6), bpfmap.Redirected, a.v4},
		{"V6ONLY", only6().connect(far6), bpfmap.RefusedFamily, netip.Addr{}},
	})
	if repaired, err := a.node.Check(a.key, a.Path); err != nil || len(repaired) != 0 {
		t.Errorf("check: repaired %q, %v; want nothing to do", repaired, err)
	}
}
