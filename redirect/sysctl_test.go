// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"net/netip"
	"os/exec"
	"slices"
	"testing"

	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/test"
)

// What somebody sets in a namespace under Weir, while it runs, changes nothing for its
// connections: redirected ones arrive over lo with addresses that few expect there.
func TestSysctlsAtRunTime(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	server := test.Echo(t, a.NetNS, "tcp4", "127.0.0.1:9000")
	for _, set := range []struct{ path, value string }{
		{"ipv4/conf/all/rp_filter", "1"},
		{"ipv4/conf/lo/rp_filter", "1"},
		{"ipv4/conf/all/rp_filter", "2"},
		{"ipv4/conf/all/route_localnet", "1"},
		{"ipv4/conf/all/accept_local", "1"},
		{"ipv4/conf/all/src_valid_mark", "1"},
		{"ipv4/conf/all/log_martians", "1"},
		{"ipv4/ip_forward", "1"},
		{"ipv6/conf/all/forwarding", "1"},
		{"ipv4/ip_nonlocal_bind", "1"},
		{"ipv6/ip_nonlocal_bind", "1"},
		{"ipv6/bindv6only", "1"},
		{"ipv4/ip_early_demux", "0"},
		{"ipv4/tcp_early_demux", "0"},
		{"ipv4/tcp_syncookies", "2"},
		{"ipv4/ip_unprivileged_port_start", "0"},
		{"ipv4/ip_local_port_range", "40000 41000"},
		{"ipv4/tcp_fwmark_accept", "1"},
		{"ipv4/fwmark_reflect", "1"},
	} {
		setSysctlIn(t, a.NetNS, set.path, set.value)
		a.works()
		if t.Failed() {
			t.Fatalf("with net/%s = %s", set.path, set.value)
		}
		healthy(t, n.Datapath)
	}
	if answer, err := a.ask("tcp4", "127.0.0.1:9000"); err != nil || answer.Server != server.Name {
		t.Errorf("a server on localhost: %+v, %v; want it", answer, err)
	}
	if answer, err := test.Ask(n.remote, "tcp4", addrPort(a.v4, 9000)); err != nil || answer.Server != a.inbound.Name {
		t.Errorf("from outside: %+v, %v; want the proxy", answer, err)
	}
}

// IPv6 that goes and comes back in a running namespace takes the routes of redirected
// connections along: what goes by IPv4 stays, the loss is told, and CHECK repairs it.
func TestIPv6GoesAndComesAtRunTime(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	origin := netip.AddrPortFrom(remote4(a.number), 4321)
	outbound := func() {
		t.Helper()
		answer, err := a.ask("tcp4", origin.String())
		if err != nil || answer.Server != a.outbound.Name || answer.Origin != origin {
			t.Errorf("dial %s: %+v, %v; want the proxy and its origin", origin, answer, err)
		}
	}
	setSysctlIn(t, a.NetNS, "ipv6/conf/all/disable_ipv6", "1")
	outbound()
	problemIs(t, a, health.ProblemRoutesMissing)
	problemIs(t, a, health.ProblemAddressesChanged)
	if repaired, err := n.Check(a.key, a.Path); err != nil || !slices.ContainsFunc(repaired, func(r program.Repair) bool { return r.Kind == program.RoutesSet }) {
		t.Errorf("check: repaired %v, %v; want the routes among it", repaired, err)
	}
	outbound()
	healthy(t, n.Datapath)

	setSysctlIn(t, a.NetNS, "ipv6/conf/eth0/addr_gen_mode", "1") // no link-local one some time later
	setSysctlIn(t, a.NetNS, "ipv6/conf/all/disable_ipv6", "0")
	outbound()
	a.Do(func() {
		if out, err := exec.Command("ip", "address", "add", netip.PrefixFrom(a.v6, 64).String(), "dev", "eth0", "nodad").CombinedOutput(); err != nil {
			t.Fatalf("give the address back: %v: %s", err, out)
		}
	})
	if _, err := n.Check(a.key, a.Path); err != nil {
		t.Fatal(err)
	}
	a.works()
	healthy(t, n.Datapath)
}
