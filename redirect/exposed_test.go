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

// exposedPort is one that Consul names for the proxy beside the mesh's, such as an
// expose path.
const exposedPort = 9102

func newExposed(t *testing.T, mode workload.Mode, guard workload.Guard) *alloc {
	t.Helper()
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) { r.Mode = mode })
	a.expose(guard)
	return a
}

func (a *alloc) expose(guard workload.Guard) {
	a.node.t.Helper()
	if err := a.node.SetMeshConfig(a.key, workload.MeshConfig{Guard: guard, ExposedPorts: []uint16{exposedPort}}); err != nil {
		a.node.t.Fatal(err)
	}
}

// An exposed port leads to the proxy's own listener and to nobody else, whoever
// listens there.
func TestExposedPort(t *testing.T) {
	for _, c := range []struct {
		mode   workload.Mode
		guard  workload.Guard
		closed bpfmap.Verdict // while the proxy does not listen
		open   bpfmap.Verdict
	}{
		{workload.ModeDirect, workload.GuardEnforce, bpfmap.RefusedGuard, bpfmap.InboundExcluded},
		{workload.ModeGateway, workload.GuardEnforce, bpfmap.RefusedGuard, bpfmap.InboundExcluded},
		{workload.ModeTransparent, workload.GuardOff, bpfmap.RefusedInboundNoProxy, bpfmap.Inbound},
		{workload.ModeTransparent, workload.GuardEnforce, bpfmap.RefusedInboundNoProxy, bpfmap.Inbound},
	} {
		t.Run(fmt.Sprintf("%s %s", c.mode, c.guard), func(t *testing.T) {
			a := newExposed(t, c.mode, c.guard)
			everywhere := fmt.Sprintf("[::]:%d", exposedPort)
			closed := func() {
				t.Helper()
				for _, addr := range []netip.Addr{a.v4, a.v6} {
					verdictsAre(t, a.rose(func() { a.refused(addr, exposedPort) }), map[bpfmap.Verdict]uint64{c.closed: 1})
				}
			}
			closed()
			task := a.serve(taskUID, a.taskCg, "tcp", everywhere)
			closed()
			task.Stop()
			proxy := a.serve(proxyUID, a.proxyCg, "tcp", everywhere)
			for _, addr := range []netip.Addr{a.v4, a.v6} {
				verdictsAre(t, a.rose(func() {
					if answer, err := a.fromOutside(addr, exposedPort); err != nil || answer.Server != proxy.Name {
						t.Errorf("dial %s: %+v, %v; want the proxy", addr, answer, err)
					}
				}), map[bpfmap.Verdict]uint64{c.open: 1})
			}
			proxy.Stop()
			a.serve(taskUID, a.taskCg, "tcp", everywhere)
			closed()
		})
	}
}

func TestExposedPortIsCountedInAudit(t *testing.T) {
	a := newExposed(t, workload.ModeDirect, workload.GuardAudit)
	task := a.serve(taskUID, a.taskCg, "tcp", fmt.Sprintf("[::]:%d", exposedPort))
	verdictsAre(t, a.rose(func() {
		if answer, err := a.fromOutside(a.v4, exposedPort); err != nil || answer.Server != task.Name {
			t.Errorf("dial: %+v, %v; want the task", answer, err)
		}
	}), map[bpfmap.Verdict]uint64{bpfmap.GuardAudited: 1})
}

func TestExposedPortIsNotForDatagrams(t *testing.T) {
	a := newExposed(t, workload.ModeDirect, workload.GuardEnforce)
	a.serve(proxyUID, a.proxyCg, "tcp4", fmt.Sprintf("0.0.0.0:%d", exposedPort))
	a.serve(taskUID, a.taskCg, "udp4", fmt.Sprintf("0.0.0.0:%d", exposedPort))
	verdictsAre(t, a.rose(func() {
		if _, err := test.Ask(a.node.remote, "udp4", addrPort(a.v4, exposedPort)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("datagram: %v, want connection refused", err)
		}
	}), map[bpfmap.Verdict]uint64{bpfmap.RefusedGuard: 1})
}

// A listener that was open before the port was named is registered.
func TestExposedPortOlderThanItsRow(t *testing.T) {
	for _, who := range []struct {
		name string
		uid  uint32
	}{{"the proxy", proxyUID}, {"a task", taskUID}} {
		t.Run(who.name, func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add(func(r *workload.Request) { r.Mode = workload.ModeDirect })
			server := a.serve(who.uid, a.proxyCg, "tcp4", fmt.Sprintf("0.0.0.0:%d", exposedPort))
			a.expose(workload.GuardEnforce)
			if who.uid == taskUID {
				a.refused(a.v4, exposedPort)
				return
			}
			answer, err := a.fromOutside(a.v4, exposedPort)
			if err != nil || answer.Server != server.Name {
				t.Errorf("dial: %+v, %v; want the proxy", answer, err)
			}
		})
	}
}

// What the proxy binds to a loopback address stays in the namespace, as without
// Weir, whether its port is named before or after.
func TestExposedPortOnALoopbackAddress(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) { r.Mode = workload.ModeDirect })
	a.serve(proxyUID, a.proxyCg, "tcp4", fmt.Sprintf("127.0.0.1:%d", exposedPort))
	a.expose(workload.GuardEnforce)
	a.refused(a.v4, exposedPort)
	a.serve(proxyUID, a.proxyCg, "tcp4", fmt.Sprintf("127.0.0.2:%d", exposedPort))
	a.refused(a.v4, exposedPort)
}

// A task under the proxy's UID cannot share the port with the proxy.
func TestExposedPortRival(t *testing.T) {
	a := newExposed(t, workload.ModeDirect, workload.GuardEnforce)
	everywhere := fmt.Sprintf("0.0.0.0:%d", exposedPort)
	a.sockets(proxyUID, a.proxyCg).mustListen("proxy", everywhere, reusePort())
	if _, err := a.sockets(proxyUID, a.taskCg).listen("rival", everywhere, 0, reusePort()); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a task under the proxy's UID listens beside it: %v, want EADDRINUSE", err)
	}
}

// What the job's own network block opens stays open by its number.
func TestExposedPortThatTheRequestExcludes(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) { r.Mode = workload.ModeDirect; r.ExcludeInboundPorts = []uint16{exposedPort} })
	a.expose(workload.GuardEnforce)
	task := a.serve(taskUID, a.taskCg, "tcp4", fmt.Sprintf("0.0.0.0:%d", exposedPort))
	if answer, err := a.fromOutside(a.v4, exposedPort); err != nil || answer.Server != task.Name {
		t.Errorf("dial: %+v, %v; want the task", answer, err)
	}
}
