// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

func (a *alloc) trust(service string, cgroup *test.Cgroup) {
	a.node.t.Helper()
	if err := a.node.SetProxyCgroup(a.key, service, cgroup.ID); err != nil {
		a.node.t.Fatal(err)
	}
}

// refusedWithoutProxy fails the test unless a connection to the remote host is
// redirected to a proxy that is not there.
func (a *alloc) refusedWithoutProxy(uid uint32, cgroup *test.Cgroup) {
	t := a.node.t
	t.Helper()
	moved := a.rose(func() {
		if answer, err := a.askAs(uid, cgroup, "tcp4", addrPort(remote4(a.number), 80)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("UID %d in cgroup %d: %q answered, error %v, want connection refused", uid, cgroup.ID, answer.Server, err)
		}
	})
	verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.Redirected: 1, bpfmap.RefusedNoProxy: 1})
}

// A proxy that is known before it listens: nobody else leaves by its UID.
func TestTrustBeforeTheProxyListens(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	remote := test.Echo(t, n.remote, "tcp4", "0.0.0.0:80")
	a.dials(proxyUID, a.taskCg, remote.Name, bpfmap.Proxy)
	for _, change := range []func() error{
		func() error { return nil },
		func() error { return n.SetProxyCgroup(a.key, "", a.proxyCg.ID) },
		func() error {
			return n.SetMeshConfig(a.key, workload.MeshConfig{Service: "web", ExcludeInboundPorts: []uint16{9090}})
		},
		func() error { _, err := n.Check(a.key, a.Path); return err },
		func() error { _, err := n.load(true); return err },
	} {
		a.trust("", a.proxyCg)
		if err := change(); err != nil {
			t.Fatal(err)
		}
		a.identity(IdentityCgroup, a.proxyCg.ID, false)
		a.refusedWithoutProxy(proxyUID, a.taskCg)
		a.dials(proxyUID, a.proxyCg, remote.Name, bpfmap.Proxy)
	}
	verdictsAre(t, a.rose(a.startProxy), map[bpfmap.Verdict]uint64{bpfmap.Listener: 2})
	a.trust("", a.taskCg) // too late: it listens
	a.identity(IdentityCgroup, a.proxyCg.ID, false)
	a.dials(proxyUID, a.taskCg, a.outbound.Name, bpfmap.Redirected)
	a.dials(proxyUID, a.proxyCg, remote.Name, bpfmap.Proxy)
}

// A proxy that restarts has another cgroup: it gets in whether that was told
// before or not, and whether the former one ever listened.
func TestTrustKeepsNoProxyOut(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	remote := test.Echo(t, n.remote, "tcp4", "0.0.0.0:80")
	for _, told := range []bool{false, true, false, true} {
		former := a.proxyCg
		a.trust("", former)
		a.proxyCg = test.NewCgroup(t)
		a.refusedWithoutProxy(proxyUID, a.proxyCg)
		if told {
			a.trust("", a.proxyCg)
			a.dials(proxyUID, a.proxyCg, remote.Name, bpfmap.Proxy)
		}
		verdictsAre(t, a.rose(a.startProxy), map[bpfmap.Verdict]uint64{bpfmap.Listener: 2})
		a.identity(IdentityCgroup, a.proxyCg.ID, false)
		a.dials(proxyUID, a.proxyCg, remote.Name, bpfmap.Proxy)
		a.dials(proxyUID, former, a.outbound.Name, bpfmap.Redirected)
		a.dials(taskUID, a.taskCg, a.outbound.Name, bpfmap.Redirected)
		a.arrives(a.v4, 8080, a.inbound.Name, true)
		a.outbound.Stop()
		a.inbound.Stop()
	}
}

// One that was registered by user space is not counted by the kernel.
func TestTrustBesideAProxyThatWasTakenIn(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	remote := test.Echo(t, n.remote, "tcp4", "0.0.0.0:80")
	a.startProxy()
	a.add()
	a.trust("", a.taskCg)
	a.identity(IdentityCgroup, a.proxyCg.ID, false)
	a.outbound.Stop()
	a.inbound.Stop()
	a.proxyCg = test.NewCgroup(t)
	a.trust("", a.proxyCg)
	a.dials(proxyUID, a.proxyCg, remote.Name, bpfmap.Proxy)
	verdictsAre(t, a.rose(a.startProxy), map[bpfmap.Verdict]uint64{bpfmap.Listener: 2})
	a.dials(taskUID, a.taskCg, a.outbound.Name, bpfmap.Redirected)
}

// Of several, each is told by its service.
func TestTrustSeveralProxies(t *testing.T) {
	s := newSeveral(t)
	remote := test.Echo(t, s.node.remote, "tcp4", "0.0.0.0:80")
	s.trust("web", s.secondCg)
	s.dials(proxyUID, s.taskCg, remote.Name, bpfmap.Proxy) // the first may be anybody
	s.trust("nobody's", s.taskCg)
	s.trust("api", s.proxyCg)
	s.identities(IdentityCgroup, s.proxyCg.ID, s.secondCg.ID)
	s.refusedWithoutProxy(proxyUID, s.taskCg)
	s.dials(proxyUID, s.proxyCg, remote.Name, bpfmap.Proxy)
	s.dials(proxyUID, s.secondCg, remote.Name, bpfmap.Proxy)
	s.startSecond()
	s.startProxy()
	s.identities(IdentityCgroup, s.proxyCg.ID, s.secondCg.ID)
	s.goesTo(nobodysVIP, s.outbound)
	s.goesTo(secondVIP, s.outbound2nd)
}

// However the proxy's listeners and the word of its cgroup cross, none of them is
// forgotten: whoever listens later is a second candidate.
func TestTrustWhileTheProxyBeginsToListen(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	proxy, second := a.sockets(proxyUID, a.proxyCg), a.sockets(proxyUID, test.NewCgroup(t))
	for round := range test.Scale(50) {
		a.trust("", test.NewCgroup(t))
		ended := make(chan error)
		go func() { ended <- n.SetProxyCgroup(a.key, "", a.taskCg.ID) }()
		listener := proxy.mustListen(fmt.Sprint(round), "127.0.0.1:15001")
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		a.identity(IdentityCgroup, a.proxyCg.ID, false)
		if list, err := n.ObservedProxies([]uint64{a.Cookie()}); err != nil || len(list[a.Cookie()]) != 1 || list[a.Cookie()][0] != (ObservedProxy{a.proxyCg.ID, true}) {
			t.Fatalf("round %d: %+v, %v; want the proxy, which listens", round, list, err)
		}
		moved := a.rose(func() {
			listener, err := second.listen("second", "[::1]:15001", 0)
			if err != nil && !errors.Is(err, syscall.EADDRINUSE) {
				t.Fatal(err)
			}
			second.close(listener)
		})
		verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.RefusedListenerIdentity: 1})
		proxy.close(listener)
		if list, err := n.ObservedProxies([]uint64{a.Cookie()}); err != nil || len(list[a.Cookie()]) != 1 || list[a.Cookie()][0] != (ObservedProxy{a.proxyCg.ID, false}) {
			t.Fatalf("round %d: %+v, %v; want the proxy, which does not listen", round, list, err)
		}
	}
}
