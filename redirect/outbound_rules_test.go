// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"net/netip"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// What is excluded goes to the remote as if there were no mesh, what is next to
// it goes to the proxy.
func TestOutboundExclusions(t *testing.T) {
	n := newNode(t)
	const high = 4294967294 // the highest UID there is; 4294967295 means none
	cidr := func(text string) func(*workload.Request) {
		return func(r *workload.Request) { r.ExcludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix(text)} }
	}
	ports := func(list ...uint16) func(*workload.Request) {
		return func(r *workload.Request) { r.ExcludeOutboundPorts = list }
	}
	uids := func(list ...uint32) func(*workload.Request) {
		return func(r *workload.Request) { r.ExcludeUIDs = list }
	}
	const v4, mapped, v6 = 1, 2, 3
	for _, tc := range []struct {
		name   string
		change func(*workload.Request)
		uid    uint32
		how    int
		port   uint16
		want   bpfmap.Verdict
	}{
		{"first port", ports(1, 65535), taskUID, v4, 1, bpfmap.PortExcluded},
		{"last port", ports(1, 65535), taskUID, v6, 65535, bpfmap.PortExcluded},
		{"port on a mapped address", ports(8080), taskUID, mapped, 8080, bpfmap.PortExcluded},
		{"last port of a row", ports(1023), taskUID, v4, 1023, bpfmap.PortExcluded},
		{"first port of the next row", ports(1023), taskUID, v4, 1024, bpfmap.Redirected},
		{"same place in another row", ports(8080), taskUID, v4, 8080 + 1024, bpfmap.Redirected},
		{"another port", ports(8081), taskUID, v4, 8080, bpfmap.Redirected},
		{"UID", uids(2000), 2000, v4, 8080, bpfmap.UIDExcluded},
		{"UID of more than 16 bits", uids(70000), 70000, v6, 8080, bpfmap.UIDExcluded},
		{"its low 16 bits", uids(70000), 70000 - 65536, v4, 8080, bpfmap.Redirected},
		{"highest UID", uids(high), high, v4, 8080, bpfmap.UIDExcluded},
		{"root", uids(0), 0, v4, 8080, bpfmap.UIDExcluded},
		{"IPv4 address", cidr("10.9.0.1/32"), taskUID, v4, 8080, bpfmap.CIDRExcluded},
		{"IPv4 address, mapped", cidr("10.9.0.1/32"), taskUID, mapped, 8080, bpfmap.CIDRExcluded},
		{"IPv4 neighbour", cidr("10.9.0.0/32"), taskUID, v4, 8080, bpfmap.Redirected},
		{"IPv4 network", cidr("10.8.0.0/15"), taskUID, v4, 8080, bpfmap.CIDRExcluded},
		{"all of IPv4", cidr("0.0.0.0/0"), taskUID, v4, 8080, bpfmap.CIDRExcluded},
		{"all of IPv4, mapped", cidr("0.0.0.0/0"), taskUID, mapped, 8080, bpfmap.CIDRExcluded},
		{"all of IPv4, but not IPv6", cidr("0.0.0.0/0"), taskUID, v6, 8080, bpfmap.Redirected},
		{"all of IPv4, written as mapped", cidr("::ffff:0:0/96"), taskUID, v4, 8080, bpfmap.CIDRExcluded},
		{"IPv6 address", cidr("fd09::1/128"), taskUID, v6, 8080, bpfmap.CIDRExcluded},
		{"IPv6 network", cidr("fd00::/8"), taskUID, v6, 8080, bpfmap.CIDRExcluded},
		{"IPv6 neighbour", cidr("fd09::/128"), taskUID, v6, 8080, bpfmap.Redirected},
		{"all of IPv6", cidr("::/0"), taskUID, v6, 8080, bpfmap.CIDRExcluded},
		{"all of IPv6, but not IPv4", cidr("::/0"), taskUID, v4, 8080, bpfmap.Redirected},
		{"all of IPv6, but not a mapped address", cidr("::/0"), taskUID, mapped, 8080, bpfmap.Redirected},
		{"half of IPv6, but not IPv4", cidr("::/1"), taskUID, v4, 8080, bpfmap.Redirected},
		{"both families", func(r *workload.Request) {
			cidr("::/0")(r)
			r.ExcludeOutboundCIDRs = append(r.ExcludeOutboundCIDRs, netip.MustParsePrefix("0.0.0.0/0"))
		}, taskUID, v4, 8080, bpfmap.CIDRExcluded},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := n.newAlloc()
			// The same addresses in every network, so that a CIDR fits.
			dial4, dial6 := netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("fd09::1")
			remote := test.NewNetNS(t)
			test.Veth(t,
				test.VethEnd{NetNS: a.NetNS, Name: "eth1", Addrs: []netip.Prefix{netip.MustParsePrefix("10.9.0.2/30"), netip.MustParsePrefix("fd09::2/126")}},
				test.VethEnd{NetNS: remote, Addrs: []netip.Prefix{netip.PrefixFrom(dial4, 30), netip.PrefixFrom(dial6, 126)}})
			server := test.Echo(t, remote, "tcp", addrPort(netip.IPv6Unspecified(), tc.port))
			a.add(tc.change)
			a.startProxy()
			p := a.actor(t, tc.uid, a.taskCg)
			domain, to, dial := unix.AF_INET, dial4, dial4
			switch tc.how {
			case mapped:
				domain, dial = unix.AF_INET6, netip.AddrFrom16(dial4.As16())
			case v6:
				domain, to, dial = unix.AF_INET6, dial6, dial6
			}
			var got test.Answer
			a.moves(t, map[bpfmap.Verdict]uint64{tc.want: 1}, func() {
				got = p.last(t, stream(domain).connect(addrPort(dial, tc.port)).ask("")).Answer
			})
			if tc.want == bpfmap.Redirected {
				second := *a // the own addresses are those of the second network
				second.v4, second.v6 = netip.MustParseAddr("10.9.0.2"), netip.MustParseAddr("fd09::2")
				second.answered(got, nil, netip.AddrPortFrom(to, tc.port), second.v4)
			} else {
				direct(t, got, server.Name, netip.AddrPortFrom(to, tc.port))
			}
		})
	}
}

// Where two rules match, the first one in the order of bpf/rules.h decides.
func TestOutboundOrderOfRules(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	const excludedUID, excludedPort, upstreamPort, dnsPort = 2000, 9001, 9191, 8600
	remote4, remote6 := remote4(a.number), remote6(a.number)
	a.add(func(r *workload.Request) {
		r.DNS = workload.DNS{Port: dnsPort}
		r.ExcludeUIDs = []uint32{excludedUID, proxyUID}
		r.ExcludeOutboundPorts = []uint16{workload.DefaultDNSPort, excludedPort}
		r.ExcludeOutboundCIDRs = []netip.Prefix{netip.PrefixFrom(remote4, 24), netip.PrefixFrom(remote6, 64)}
	})
	a.startProxy()
	dns := a.serve(proxyUID, a.proxyCg, "tcp4", "127.0.0.1:8600")
	upstream := a.serve(proxyUID, a.proxyCg, "tcp4", "127.0.0.1:9191")
	meshConfig := workload.MeshConfig{Upstreams: []workload.Upstream{{Name: "db", Addresses: []netip.Addr{remote4, a.v4}, Listener: upstream.Addr}}}
	if err := n.SetMeshConfig(a.key, meshConfig); err != nil {
		t.Fatal(err)
	}
	app := a.serve(taskUID, a.taskCg, "tcp", "[::]:9001")
	far := test.Echo(t, n.remote, "tcp", "[::]:9001")
	far2 := test.Echo(t, n.remote, "tcp", "[::]:8080")
	task, proxy, excluded := a.task(t), a.actor(t, proxyUID, a.proxyCg), a.actor(t, excludedUID, a.taskCg)

	const remoteV6, remoteV6Excluded = "[fd09:1::1]:8080", "[fd09:1::1]:9001"
	inet, inet6 := stream(unix.AF_INET), stream(unix.AF_INET6)
	for _, tc := range []struct {
		name   string
		who    actor
		script script
		want   bpfmap.Verdict
		errno  syscall.Errno
		server string
	}{
		{"encoded before proxy", proxy, inet.connect("127.128.0.1:80"), bpfmap.RefusedEncoded, unix.ECONNREFUSED, ""},
		{"encoded before UID", excluded, inet.connect("127.128.0.1:80"), bpfmap.RefusedEncoded, unix.ECONNREFUSED, ""},
		{"encoded before DNS", task, inet.connect("127.128.0.1:53"), bpfmap.RefusedEncoded, unix.ECONNREFUSED, ""},
		{"encoded before port", task, inet.connect("127.128.0.1:9001"), bpfmap.RefusedEncoded, unix.ECONNREFUSED, ""},
		{"DNS before proxy", proxy, inet.connect("127.0.0.1:53"), bpfmap.ToDNS, 0, dns.Name},
		{"DNS before UID", excluded, inet.connect("127.0.0.1:53"), bpfmap.ToDNS, 0, dns.Name},
		{"DNS before loopback and port", task, inet.connect("127.0.0.1:53"), bpfmap.ToDNS, 0, dns.Name},
		{"proxy before UID", proxy, inet6.connect(remoteV6), bpfmap.Proxy, 0, far2.Name},
		{"proxy before loopback", proxy, inet.connect("127.0.0.1:9001"), bpfmap.Proxy, 0, app.Name},
		{"proxy before upstream", proxy, inet.connect("10.9.1.1:8080"), bpfmap.Proxy, 0, far2.Name},
		{"UID before loopback", excluded, inet.connect("127.0.0.1:9001"), bpfmap.UIDExcluded, 0, app.Name},
		{"UID before upstream", excluded, inet.connect("10.9.1.1:8080"), bpfmap.UIDExcluded, 0, far2.Name},
		{"UID before port", excluded, inet6.connect(remoteV6Excluded), bpfmap.UIDExcluded, 0, far.Name},
		{"own address before upstream and port", task, inet.connect("10.9.1.2:9001"), bpfmap.Local, 0, app.Name},
		{"upstream before port and CIDR", task, inet.connect("10.9.1.1:9001"), bpfmap.ToUpstream, 0, upstream.Name},
		{"port before CIDR", task, inet6.connect(remoteV6Excluded), bpfmap.PortExcluded, 0, far.Name},
		{"port before device", task, inet6.device("eth0").connect(remoteV6Excluded), bpfmap.PortExcluded, 0, far.Name},
		{"CIDR before device", task, inet6.device("eth0").connect(remoteV6), bpfmap.CIDRExcluded, 0, far2.Name},
		{"device before family", task, inet6.set(unix.SOL_IPV6, unix.IPV6_V6ONLY, 1).device("eth0").connect("[2001:db8::1]:80"),
			bpfmap.RefusedDevice, unix.ENETUNREACH, ""},
		{"none", task, inet.connect(somewhere), bpfmap.Redirected, 0, a.outbound.Name},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a.moves(t, map[bpfmap.Verdict]uint64{tc.want: 1}, func() {
				script := tc.script.fails(tc.errno)
				if tc.errno == 0 {
					script = script.ask("")
				}
				if got := tc.who.last(t, script).Answer; got.Server != tc.server {
					t.Errorf("%q answered, want %q", got.Server, tc.server)
				}
			})
		})
	}
}

// Outside of transparent mode only explicit upstreams are the proxy's.
func TestOutboundDirectModes(t *testing.T) {
	n := newNode(t)
	for _, mode := range []workload.Mode{workload.ModeDirect, workload.ModeGateway} {
		t.Run(string(mode), func(t *testing.T) {
			a := n.newAlloc()
			a.add(func(r *workload.Request) { r.Mode = mode })
			a.startProxy()
			upstream := a.serve(proxyUID, a.proxyCg, "tcp4", "127.0.0.1:9191")
			meshConfig := workload.MeshConfig{Upstreams: []workload.Upstream{{Name: "db", Addresses: []netip.Addr{netip.MustParseAddr("240.0.0.5")}, Listener: upstream.Addr}}}
			if err := n.SetMeshConfig(a.key, meshConfig); err != nil {
				t.Fatal(err)
			}
			far := test.Echo(t, n.remote, "tcp", addrPort(remote4(a.number), 8080))
			p := a.task(t)
			for _, s := range []script{stream(unix.AF_INET), stream(unix.AF_INET).device("eth0")} {
				a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.Direct: 1}, func() {
					direct(t, p.last(t, s.connect(far.Addr.String()).ask("")).Answer, far.Name, far.Addr)
				})
			}
			a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.ToUpstream: 1}, func() {
				got := p.last(t, stream(unix.AF_INET).connect("240.0.0.5:80").ask("")).Answer
				if got.Server != upstream.Name || got.To.String() != "240.0.0.5:80" {
					t.Errorf("%s answered as %s, want %s", got.Server, got.To, upstream.Name)
				}
			})
			a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.Local: 1}, func() {
				p.run(t, stream(unix.AF_INET).connect(upstream.Addr.String()))
			})
		})
	}
}
