// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
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
	verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.RefusedNoProxy: 1})
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
		a.identity(inspect.IdentityCgroup, a.proxyCg.ID, false)
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
