// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/test"
)

// The guard of an allocation that no plugin was called for: what a task binds to
// every address is counted in audit and refused in enforce, from the host as from
// a neighbour, while the proxy, mapped ports and expose paths stay reachable.
func TestGuard(t *testing.T) {
	n := newMeshNode(t, false)
	n.runAgent()
	a := n.allocate("", map[string]any{"hostPort": 25000, "containerPort": 8081, "protocol": "tcp"})
	neighbour := n.allocate("")
	const (
		proxy, application, mapped, exposed, admin = 20001, 8080, 8081, 21500, 19000
	)
	servers := make(map[int]*test.ServerProcess)
	for _, port := range []int{proxy, application, mapped, exposed, admin} {
		servers[port] = test.EchoProcess(t, a.spec(1000), "tcp4", fmt.Sprintf("0.0.0.0:%d", port))
	}
	register := func(guard string) {
		a.register("api", object{"Port": proxy, "Meta": object{"weir-guard": guard}, "Proxy": object{
			"Expose": object{"Paths": []object{{"Path": "/health", "ListenerPort": exposed, "LocalPathPort": application}}}}})
	}
	guarded := func(t *testing.T, want redirect.Guard) {
		t.Helper()
		a.eventually("the guard", func(o redirect.Overlay) bool { return o.Guard == want })
		if w, err := a.workload(); err != nil || w.Guard != want || len(w.Problems) > 0 {
			t.Fatalf("the kernel has %+v, %v; want guard %s without problems", w, err, want)
		}
	}
	dial := func(t *testing.T, from *test.NetNS, port int) error {
		t.Helper()
		answer, err := test.Ask(from, "tcp4", netip.AddrPortFrom(a.addr, uint16(port)).String())
		if err == nil && answer.Server != servers[port].Name {
			t.Errorf("port %d is answered by %q", port, answer.Server)
		}
		return err
	}
	from := map[string]*test.NetNS{"the host": n.outside, "a neighbour": neighbour.ns}

	register("audit")
	guarded(t, redirect.GuardAudit)
	t.Run("audit", func(t *testing.T) {
		for name, ns := range from {
			before := a.counted(t, redirect.GuardAudited)
			for port := range servers {
				if err := dial(t, ns, port); err != nil {
					t.Errorf("dial of port %d from %s: %v", port, name, err)
				}
			}
			if rose := a.counted(t, redirect.GuardAudited) - before; rose != 2 {
				t.Errorf("%d connections from %s were counted, want 2: the application's and the admin port's", rose, name)
			}
		}
	})

	register("enforce")
	guarded(t, redirect.GuardEnforce)
	t.Run("enforce", func(t *testing.T) {
		for name, ns := range from {
			for _, port := range []int{proxy, mapped, exposed} {
				if err := dial(t, ns, port); err != nil {
					t.Errorf("dial of port %d from %s: %v", port, name, err)
				}
			}
			for _, port := range []int{application, admin} {
				if err := dial(t, ns, port); !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("dial of port %d from %s = %v, want ECONNREFUSED", port, name, err)
				}
			}
		}
		for _, address := range []string{"127.0.0.1", a.addr.String()} {
			if _, err := test.NewClient(t, a.spec(1000)).Ask("tcp4", fmt.Sprintf("%s:%d", address, application)); err != nil {
				t.Errorf("a task's own dial of %s: %v", address, err)
			}
		}
	})

	t.Run("a job cannot weaken it", func(t *testing.T) {
		register("off")
		a.eventually("the node's own guard", func(o redirect.Overlay) bool { return o.Guard == redirect.GuardAudit })
	})
}

// counted is how often a verdict was reached in the allocation.
func (a *meshAlloc) counted(t *testing.T, verdict redirect.Verdict) uint64 {
	t.Helper()
	list, err := a.node.Verdicts()
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range list {
		if w.Key.ContainerID == a.id {
			return w.Counts[verdict.String()]
		}
	}
	t.Fatalf("no counters of allocation %s", a.id)
	return 0
}
