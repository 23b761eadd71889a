// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// dials fails the test unless a process of the allocation reaches server at the remote
// host's port 80, with the verdict and no other.
func (a *alloc) dials(uid uint32, cgroup *test.Cgroup, server string, verdict bpfmap.Verdict) {
	t := a.node.t
	t.Helper()
	moved := a.rose(func() {
		answer, err := a.askAs(uid, cgroup, "tcp4", addrPort(remote4(a.number), 80))
		if err != nil || answer.Server != server {
			t.Errorf("UID %d in cgroup %d: %q answered, error %v, want %q", uid, cgroup.ID, answer.Server, err, server)
		}
	})
	verdictsAre(t, moved, map[bpfmap.Verdict]uint64{verdict: 1})
}

// identity fails the test unless Workloads tells the proxy's so.
func (a *alloc) identity(want inspect.Identity, cgroup uint64, noted bool) {
	t := a.node.t
	t.Helper()
	status := a.status()
	if status.Proxy.Identity != want || status.Proxy.Cgroup != cgroup {
		t.Errorf("proxy: %+v, want identity %q and cgroup %d", status.Proxy, want, cgroup)
	}
	if got := strings.Contains(strings.Join(status.Notes, "\n"), "share a cgroup"); got != noted {
		t.Errorf("notes %q: says that a cgroup is shared: %t, want %t", status.Notes, got, noted)
	}
}

func TestIdentitySeparateCgroups(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	remote := test.Echo(t, n.remote, "tcp4", "0.0.0.0:80")
	// Nothing but the UID is known until the proxy listens.
	a.identity(inspect.IdentityUID, 0, false)
	a.dials(proxyUID, a.proxyCg, remote.Name, bpfmap.Proxy)
	a.startProxy()
	a.identity(inspect.IdentityCgroup, a.proxyCg.ID, false)
	for range 2 {
		a.dials(proxyUID, a.proxyCg, remote.Name, bpfmap.Proxy)
		a.dials(proxyUID, a.taskCg, a.outbound.Name, bpfmap.Redirected)
		a.dials(taskUID, a.taskCg, a.outbound.Name, bpfmap.Redirected)
		a.dials(0, a.taskCg, a.outbound.Name, bpfmap.Redirected)
	}
	a.identity(inspect.IdentityCgroup, a.proxyCg.ID, false)
}

func TestIdentitySharedCgroup(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	remote := test.Echo(t, n.remote, "tcp4", "0.0.0.0:80")
	a.proxyCg = a.taskCg
	a.startProxy()
	a.dials(proxyUID, a.taskCg, remote.Name, bpfmap.Proxy)
	a.dials(taskUID, a.taskCg, a.outbound.Name, bpfmap.Redirected)
	a.identity(inspect.IdentityUID, a.taskCg.ID, true)
	a.dials(proxyUID, a.taskCg, remote.Name, bpfmap.Proxy)
	a.dials(taskUID, a.taskCg, a.outbound.Name, bpfmap.Redirected)
	// Restarted in a cgroup of its own, it is told by that.
	a.outbound.Stop()
	a.inbound.Stop()
	a.proxyCg = test.NewCgroup(t)
	a.startProxy()
	a.dials(proxyUID, a.proxyCg, remote.Name, bpfmap.Proxy)
	a.dials(proxyUID, a.taskCg, a.outbound.Name, bpfmap.Redirected)
	a.identity(inspect.IdentityCgroup, a.proxyCg.ID, false)
}

func TestIdentityOfARestartedProxy(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	remote := test.Echo(t, n.remote, "tcp4", "0.0.0.0:80")
	a.startProxy()
	for range 3 {
		former := a.proxyCg
		a.outbound.Stop()
		a.dials(proxyUID, former, remote.Name, bpfmap.Proxy) // one listener is left
		a.inbound.Stop()
		a.proxyCg = test.NewCgroup(t)
		moved := a.rose(func() { a.startProxy() })
		verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.Listener: 2})
		a.identity(inspect.IdentityCgroup, a.proxyCg.ID, false)
		a.dials(proxyUID, a.proxyCg, remote.Name, bpfmap.Proxy)
		a.dials(proxyUID, former, a.outbound.Name, bpfmap.Redirected)
		a.dials(taskUID, a.taskCg, a.outbound.Name, bpfmap.Redirected)
		a.arrives(a.v4, 8080, a.inbound.Name, true)
	}
}

// A task that takes the proxy's port in the moment in which the proxy is down is
// taken for it only as long as it listens there.
func TestIdentityTakeoverEndsWithItsListener(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	remote := test.Echo(t, n.remote, "tcp4", "0.0.0.0:80")
	a.startProxy()
	proxy := a.proxyCg
	for range 2 {
		a.outbound.Stop()
		a.inbound.Stop()
		a.proxyCg = a.taskCg
		a.startProxy()
		a.dials(proxyUID, a.taskCg, remote.Name, bpfmap.Proxy)
		a.outbound.Stop()
		a.dials(proxyUID, a.taskCg, remote.Name, bpfmap.Proxy) // one listener is left
		a.inbound.Stop()
		moved := a.rose(func() {
			if answer, err := a.askAs(proxyUID, a.taskCg, "tcp4", addrPort(remote4(a.number), 80)); err == nil {
				t.Errorf("the task got out again: %+v", answer)
			}
		})
		if moved[bpfmap.Proxy] != 0 {
			t.Errorf("verdicts %v: the task is still taken for the proxy", moved)
		}
		a.proxyCg = proxy
		a.startProxy()
		a.dials(proxyUID, proxy, remote.Name, bpfmap.Proxy)
		a.dials(proxyUID, a.taskCg, a.outbound.Name, bpfmap.Redirected)
	}
}

// Who comes second under the proxy's UID, while the first lives, is a task.
func TestIdentitySecondClaimant(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	second := a.sockets(proxyUID, a.taskCg)
	// Bound before the proxy came, listening after.
	early := second.open(unix.AF_INET6, unix.SOCK_STREAM, 0)
	second.must(socketCall{Op: "bind", FD: early, Addr: netip.MustParseAddrPort("[::1]:15001")})
	a.startProxy()
	moved := a.rose(func() { second.must(socketCall{Op: "serve", FD: early, Name: "second"}) })
	verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.RefusedListenerIdentity: 1})
	// Older than a check, too, it is not registered; but Status tells of it.
	if repaired, err := n.Check(a.key, a.Path); err != nil || len(repaired) > 0 {
		t.Errorf("check beside a second candidate: %v, repaired %q", err, repaired)
	}
	n.ails("[::1]:15001 under the proxy's UID is not registered")
	for _, addr := range []string{"[::1]:20000", addrPort(a.v6, 20000), "127.0.0.9:15001"} {
		moved := a.rose(func() {
			if _, err := second.listen("second", addr, 0, reusePort()); !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("listen on %s as the second candidate: %v, want address in use", addr, err)
			}
		})
		verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.RefusedListenerIdentity: 1})
	}
	// The rest of the ports are not the proxy's.
	second.close(second.mustListen("second", "127.0.0.1:15002"))
	a.identity(inspect.IdentityCgroup, a.proxyCg.ID, false)
	a.dials(proxyUID, a.taskCg, a.outbound.Name, bpfmap.Redirected)
	a.arrives(a.v4, 8080, a.inbound.Name, true)
	a.refused(a.v6, 8080)
	if got := a.spread(test.Scale(50)); len(got) != 1 || got[a.outbound.Name] == 0 {
		t.Errorf("beside a second candidate: who answered: %v", got)
	}
}

// An Envoy that has bound its port before the workload was added, and listens only
// afterwards, is the proxy all the same: the agent adds a gateway while its Envoy starts.
func TestIdentityOfWhoBoundBeforeAdd(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:15001", "[::]:15001"} {
		t.Run(addr, func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			proxy, task := a.sockets(proxyUID, a.proxyCg), a.sockets(taskUID, a.taskCg)
			early, err := proxy.bind(addr, 0)
			if err != nil {
				t.Fatal(err)
			}
			foreign, err := task.bind("127.0.0.9:20000", 0)
			if err != nil {
				t.Fatal(err)
			}
			a.add()
			// Of a task it is refused as ever, by the UID of its socket.
			moved := a.rose(func() { task.must(socketCall{Op: "serve", FD: foreign, Name: "task"}) })
			verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.RefusedListenerIdentity: 1})
			moved = a.rose(func() { proxy.must(socketCall{Op: "serve", FD: early, Name: "proxy"}) })
			verdictsAre(t, moved, map[bpfmap.Verdict]uint64{bpfmap.Listener: 1})
			a.identity(inspect.IdentityCgroup, a.proxyCg.ID, false)
			a.dials(taskUID, a.taskCg, "proxy", bpfmap.Redirected)
			n.healthy()
		})
	}
}

func TestIdentityExcludedUIDs(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	var uids []uint32
	for uid := range uint32(300) {
		uids = append(uids, 50000+uid)
	}
	a.add(func(r *workload.Request) { r.ExcludeUIDs = append(uids, 0, 4294967294) })
	remote := test.Echo(t, n.remote, "tcp4", "0.0.0.0:80")
	a.startProxy()
	for _, uid := range []uint32{50000, 50299, 0, 4294967294} {
		a.dials(uid, a.taskCg, remote.Name, bpfmap.UIDExcluded)
	}
	for _, uid := range []uint32{49999, 50300, taskUID} {
		a.dials(uid, a.taskCg, a.outbound.Name, bpfmap.Redirected)
	}
}

// UIDs have 32 bits: what a mask or a sign would cut off tells two of them apart.
func TestIdentity32BitUIDs(t *testing.T) {
	for _, uid := range []uint32{65536 + proxyUID, 1<<31 + proxyUID, 4294967294} {
		t.Run(fmt.Sprint(uid), func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add(func(r *workload.Request) { r.ProxyUID = uid })
			remote := test.Echo(t, n.remote, "tcp4", "0.0.0.0:80")
			a.outbound = a.serve(uid, a.proxyCg, "tcp4", outboundListener)
			a.inbound = a.serve(uid, a.proxyCg, "tcp4", "0.0.0.0:20000")
			a.dials(uid, a.proxyCg, remote.Name, bpfmap.Proxy)
			for _, other := range []uint32{uid & 0xffff, uid & 0x7fffffff, uid - 1} {
				if other != uid {
					a.dials(other, a.proxyCg, a.outbound.Name, bpfmap.Redirected)
				}
			}
			a.arrives(a.v4, 8080, a.inbound.Name, true)
			if got := a.status().Proxy.UID; got != uid {
				t.Errorf("status says UID %d, want %d", got, uid)
			}
		})
	}
}
