// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// The second proxy's ports, what it owns, and an address that nobody owns.
const (
	secondOutbound = 15002
	secondInbound  = 20001
	secondService  = 8081
	secondVIP      = "240.0.0.2"
	nobodysVIP     = "240.0.0.9"
)

// several is an allocation with two services: all proxies run under one UID,
// each in a cgroup of its own.
type several struct {
	*alloc
	secondCg                *test.Cgroup
	outbound2nd, inbound2nd *test.ServerProcess
}

func newSeveral(t *testing.T) *several {
	t.Helper()
	a := newNode(t).newAlloc()
	a.add()
	s := &several{alloc: a, secondCg: test.NewCgroup(t)}
	s.set(s.meshConfig())
	return s
}

func (s *several) meshConfig() workload.MeshConfig {
	return workload.MeshConfig{Service: "api", Proxies: []workload.Sidecar{{
		Service: "web", InboundPort: secondInbound, OutboundPort: secondOutbound,
		ServicePorts: []uint16{secondService}, VirtualIPs: test.Addrs(secondVIP),
	}}}
}

// turned is the same two proxies in the other order.
func (s *several) turned() workload.MeshConfig {
	return workload.MeshConfig{Service: "web", InboundPort: secondInbound, OutboundPort: secondOutbound, Proxies: []workload.Sidecar{{
		Service: "api", InboundPort: inboundPort, OutboundPort: outboundPort,
	}}}
}

func (s *several) set(meshConfig workload.MeshConfig) {
	s.node.t.Helper()
	if err := s.node.SetMeshConfig(s.key, meshConfig); err != nil {
		s.node.t.Fatal(err)
	}
}

func (s *several) startSecond() {
	s.node.t.Helper()
	s.outbound2nd = s.serve(proxyUID, s.secondCg, "tcp4", fmt.Sprintf("127.0.0.1:%d", secondOutbound))
	s.inbound2nd = s.serve(proxyUID, s.secondCg, "tcp4", fmt.Sprintf("0.0.0.0:%d", secondInbound))
}

// goesTo fails the test unless a task's connection to the address is redirected
// to the proxy, which is told the address.
func (s *several) goesTo(addr string, proxy *test.ServerProcess) {
	t := s.node.t
	t.Helper()
	origin := netip.AddrPortFrom(netip.MustParseAddr(addr), 80)
	moved := s.rose(func() {
		answer, err := s.ask("tcp4", origin.String())
		if err != nil || answer.Server != proxy.Name || answer.Origin != origin || answer.To != origin {
			t.Errorf("dial %s: %+v, %v; want %q, which is told so", origin, answer, err, proxy.Name)
		}
	})
	verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.Redirected: 1})
}

// identities fails the test unless all proxies are told so.
func (s *several) identities(want Identity, cgroups ...uint64) {
	t := s.node.t
	t.Helper()
	status := s.status()
	got := append([]ProxyStatus{status.Proxy}, status.Sidecars...)
	if len(got) != len(cgroups) || len(status.Problems) > 0 {
		t.Errorf("proxies %+v, problems %v; want %d and none", got, status.Problems, len(cgroups))
		return
	}
	for i, cgroup := range cgroups {
		if got[i].Cgroup != cgroup || got[i].Identity != want {
			t.Errorf("proxy %d: %+v, want identity %q and cgroup %d", i, got[i], want, cgroup)
		}
	}
}

func TestSeveralProxies(t *testing.T) {
	s := newSeveral(t)
	s.startProxy()
	s.startSecond()
	s.identities(IdentityCgroup, s.proxyCg.ID, s.secondCg.ID)
	for range 2 {
		s.goesTo(nobodysVIP, s.outbound)
		s.goesTo(secondVIP, s.outbound2nd)
	}
	for port, proxy := range map[uint16]*test.ServerProcess{
		inboundPort: s.inbound, secondInbound: s.inbound2nd, secondService: s.inbound2nd, 8080: s.inbound, secondOutbound: s.inbound,
	} {
		s.arrives(s.v4, port, proxy.Name, true)
	}
	// One that is away does not send its connections to the other.
	s.outbound2nd.Stop()
	s.inbound2nd.Stop()
	s.refused(s.v4, secondService)
	moved := s.rose(func() {
		if _, err := s.ask("tcp4", secondVIP+":80"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial what a stopped proxy owns: %v, want connection refused", err)
		}
	})
	verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.Redirected: 1, bpfmap.RefusedNoProxy: 1})
	s.goesTo(nobodysVIP, s.outbound)
	s.secondCg = test.NewCgroup(t)
	s.startSecond()
	s.goesTo(secondVIP, s.outbound2nd)
	s.identities(IdentityCgroup, s.proxyCg.ID, s.secondCg.ID)
}

func TestSeveralProxiesIdentity(t *testing.T) {
	s := newSeveral(t)
	remote := test.Echo(t, s.node.remote, "tcp4", "0.0.0.0:80")
	s.startProxy()
	// The second has not shown itself: it may be whoever has the UID.
	s.identities(IdentityUID, s.proxyCg.ID, 0)
	s.dials(proxyUID, s.secondCg, remote.Name, bpfmap.Proxy)
	s.startSecond()
	for range 2 {
		s.dials(proxyUID, s.proxyCg, remote.Name, bpfmap.Proxy)
		s.dials(proxyUID, s.secondCg, remote.Name, bpfmap.Proxy)
		s.dials(proxyUID, s.taskCg, s.outbound.Name, bpfmap.Redirected)
		s.dials(taskUID, s.taskCg, s.outbound.Name, bpfmap.Redirected)
	}
	s.identities(IdentityCgroup, s.proxyCg.ID, s.secondCg.ID)
	// Neither a task nor the other proxy gets a part of a proxy's connections.
	for _, cgroup := range []*test.Cgroup{s.taskCg, s.proxyCg} {
		rival := s.sockets(proxyUID, cgroup)
		for _, addr := range []string{"[::1]:15002", "[::1]:20001"} {
			moved := s.rose(func() {
				if _, err := rival.listen("rival", addr, 0, reusePort()); !errors.Is(err, syscall.EADDRINUSE) {
					t.Errorf("listen on %s beside the second proxy: %v, want address in use", addr, err)
				}
			})
			verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.RefusedListenerIdentity: 1})
		}
	}
	// A task that shares the second proxy's cgroup makes its UID decide there.
	s.dials(taskUID, s.secondCg, s.outbound.Name, bpfmap.Redirected)
	if got := s.status().Sidecars[0].Identity; got != IdentityUID {
		t.Errorf("a proxy that shares its cgroup is told by %q", got)
	}
}

// The order of proxies, and who owns an address, change under open listeners
// and interned origins.
func TestSeveralProxiesChange(t *testing.T) {
	s := newSeveral(t)
	remote := test.Echo(t, s.node.remote, "tcp4", "0.0.0.0:80")
	s.startProxy()
	s.startSecond()
	s.goesTo(secondVIP, s.outbound2nd)
	s.goesTo(nobodysVIP, s.outbound)
	before := s.origins(t)
	s.set(s.turned())
	s.identities(IdentityCgroup, s.secondCg.ID, s.proxyCg.ID)
	s.goesTo(nobodysVIP, s.outbound2nd)
	s.goesTo(secondVIP, s.outbound2nd)
	s.arrives(s.v4, 8080, s.inbound2nd.Name, true)
	s.arrives(s.v4, inboundPort, s.inbound.Name, true)
	// One owner after another.
	turned := s.turned()
	turned.Proxies[0].VirtualIPs = test.Addrs(nobodysVIP)
	s.set(turned)
	s.goesTo(nobodysVIP, s.outbound)
	if after := s.origins(t); after != before {
		t.Errorf("%d origins are held, %d before anything changed", after, before)
	}
	s.dials(proxyUID, s.proxyCg, remote.Name, bpfmap.Proxy)
	s.dials(proxyUID, s.taskCg, s.outbound2nd.Name, bpfmap.Redirected)
	// The one that goes leaves nothing, and comes back as one that is not known.
	s.set(workload.MeshConfig{Service: "web", InboundPort: secondInbound, OutboundPort: secondOutbound})
	s.identities(IdentityCgroup, s.secondCg.ID)
	s.goesTo(nobodysVIP, s.outbound2nd)
	s.arrives(s.v4, inboundPort, s.inbound2nd.Name, true)
	s.dials(proxyUID, s.proxyCg, s.outbound2nd.Name, bpfmap.Redirected)
	s.set(turned)
	s.identities(IdentityCgroup, s.secondCg.ID, s.proxyCg.ID) // by its listeners, which are registered
	s.goesTo(nobodysVIP, s.outbound)
	s.arrives(s.v4, inboundPort, s.inbound.Name, true)
	s.inbound.Stop()
	s.outbound.Stop()
	s.proxyCg = test.NewCgroup(t)
	if _, err := s.node.Check(s.key, s.Path); err != nil {
		t.Fatal(err)
	}
	s.startProxy()
	s.identities(IdentityCgroup, s.secondCg.ID, s.proxyCg.ID)
}

// A proxy whose listeners are older than Consul's news of it.
func TestSeveralProxiesOpenedBefore(t *testing.T) {
	a := newNode(t).newAlloc()
	a.add()
	s := &several{alloc: a, secondCg: test.NewCgroup(t)}
	s.startProxy()
	s.startSecond()
	s.goesTo(secondVIP, s.outbound)
	s.set(s.meshConfig())
	s.identities(IdentityCgroup, s.proxyCg.ID, s.secondCg.ID)
	s.goesTo(secondVIP, s.outbound2nd)
	s.arrives(s.v4, secondService, s.inbound2nd.Name, true)
	repaired, err := s.node.Check(s.key, s.Path)
	if err != nil || len(repaired) > 0 {
		t.Errorf("check: %v, repaired %q", err, repaired)
	}
	for _, table := range []string{"proxies", "exclusions", "addresses", "listeners"} {
		s.dropRow(t, table)
		if repaired, err := s.node.Check(s.key, s.Path); err != nil || len(repaired) == 0 {
			t.Errorf("check without %s: %v, repaired %q", table, err, repaired)
		}
		s.goesTo(secondVIP, s.outbound2nd)
		s.arrives(s.v4, secondInbound, s.inbound2nd.Name, true)
		s.identities(IdentityCgroup, s.proxyCg.ID, s.secondCg.ID)
	}
}

// What families a proxy takes is its own matter.
func TestSeveralProxiesFamilies(t *testing.T) {
	s := newSeveral(t)
	s.startProxy()
	six := s.serve(proxyUID, s.secondCg, "tcp6", fmt.Sprintf("[::1]:%d", secondOutbound))
	s.goesTo(nobodysVIP, s.outbound)
	moved := s.rose(func() {
		if _, err := s.ask("tcp4", secondVIP+":80"); !errors.Is(err, syscall.ENETUNREACH) {
			t.Errorf("dial by IPv4 what a proxy on IPv6 owns: %v, want network unreachable", err)
		}
	})
	verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.RefusedFamily: 1})
	meshConfig := s.meshConfig()
	meshConfig.Proxies[0].VirtualIPs = test.Addrs("fd00::2")
	s.set(meshConfig)
	if answer, err := s.ask("tcp6", "[fd00::2]:80"); err != nil || answer.Server != six.Name || answer.Origin.String() != "[fd00::2]:80" {
		t.Errorf("dial by IPv6: %+v, %v; want %q", answer, err, six.Name)
	}
}

// Plain sidecars under an enforcing guard: each one's port, each one's
// upstreams, and nothing else.
func TestSeveralPlainProxies(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) { r.Mode = workload.ModeDirect })
	upstream := func(name, vip, listener string) workload.Upstream {
		return workload.Upstream{Name: name, Addresses: test.Addrs(vip), Listener: netip.MustParseAddrPort(listener)}
	}
	if err := n.SetMeshConfig(a.key, workload.MeshConfig{
		Guard: workload.GuardEnforce, Service: "api", InboundPort: inboundPort,
		Proxies:   []workload.Sidecar{{Service: "web", InboundPort: secondInbound}},
		Upstreams: []workload.Upstream{upstream("db", "240.0.0.1", "127.0.0.1:9191"), upstream("cache", "240.0.0.2", "127.0.0.1:9292")},
	}); err != nil {
		t.Fatal(err)
	}
	second := test.NewCgroup(t)
	first := []*test.ServerProcess{a.serve(proxyUID, a.proxyCg, "tcp4", "0.0.0.0:20000"), a.serve(proxyUID, a.proxyCg, "tcp4", "127.0.0.1:9191")}
	other := []*test.ServerProcess{a.serve(proxyUID, second, "tcp4", "0.0.0.0:20001"), a.serve(proxyUID, second, "tcp4", "127.0.0.1:9292")}
	app := a.serve(taskUID, a.taskCg, "tcp4", "0.0.0.0:8080")
	moved := a.rose(func() {
		for addr, want := range map[string]string{addrPort(a.v4, inboundPort): first[0].Name, addrPort(a.v4, secondInbound): other[0].Name} {
			if answer, err := test.Ask(n.remote, "tcp4", addr); err != nil || answer.Server != want {
				t.Errorf("%s from outside: %q answers, %v; want %q", addr, answer.Server, err, want)
			}
		}
	})
	verdictsAre(t, moved, map[bpfmap.Verdict]uint64{}) // a proxy's port is no exclusion
	if _, err := test.Ask(n.remote, "tcp4", addrPort(a.v4, 8080)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the application from outside: %v, want connection refused", err)
	}
	for addr, want := range map[string]string{
		"240.0.0.1:80": first[1].Name, "240.0.0.2:80": other[1].Name, "127.0.0.1:9292": other[1].Name, addrPort(a.v4, 8080): app.Name,
	} {
		if answer, err := a.ask("tcp4", addr); err != nil || answer.Server != want {
			t.Errorf("%s from a task: %q answers, %v; want %q", addr, answer.Server, err, want)
		}
	}
	// Neither proxy's own connections are anybody's business.
	remote := test.Echo(t, n.remote, "tcp4", "0.0.0.0:80")
	a.dials(proxyUID, a.proxyCg, remote.Name, bpfmap.Proxy)
	a.dials(proxyUID, second, remote.Name, bpfmap.Proxy)
	a.dials(proxyUID, a.taskCg, remote.Name, bpfmap.Direct)
}

// The listeners of a proxy that is gone from Consul close when another one sits
// in its proxy ID: they are not that one's.
func TestSeveralProxiesSeatIsTakenOver(t *testing.T) {
	s := newSeveral(t)
	s.startProxy()
	s.startSecond()
	s.set(workload.MeshConfig{})
	s.set(workload.MeshConfig{Service: "api", Proxies: []workload.Sidecar{{Service: "db", InboundPort: 20003, OutboundPort: 15003}}})
	third := test.NewCgroup(t)
	s.serve(proxyUID, third, "tcp4", "127.0.0.1:15003")
	s.serve(proxyUID, third, "tcp4", "0.0.0.0:20003")
	s.identities(IdentityCgroup, s.proxyCg.ID, third.ID)
	s.outbound2nd.Stop()
	s.inbound2nd.Stop()
	rival := s.sockets(proxyUID, s.taskCg)
	if _, err := rival.listen("rival", "[::1]:15003", 0, reusePort()); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("listen beside the third proxy: %v, want address in use", err)
	}
	s.identities(IdentityCgroup, s.proxyCg.ID, third.ID)
}
