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

// guarded is an allocation in direct mode with an application on every address
// and a proxy's listener.
func guarded(t *testing.T, guard workload.Guard) *alloc {
	t.Helper()
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) { r.Mode = workload.ModeDirect; r.ExcludeInboundPorts = []uint16{7070} })
	if err := n.SetMeshConfig(a.key, workload.MeshConfig{Guard: guard}); err != nil {
		t.Fatal(err)
	}
	for _, port := range []int{7070, 8080, inboundPort, 15001} {
		a.serve(taskUID, a.taskCg, "tcp", fmt.Sprintf("[::]:%d", port))
	}
	a.serve(taskUID, a.taskCg, "udp", "[::]:8080")
	a.serve(taskUID, a.taskCg, "udp", "[::]:7070")
	a.serve(taskUID, a.taskCg, "udp", "[::]:40000")
	return a
}

// outside dials the allocation's port from the remote over both families.
func (a *alloc) outside(network string, port uint16) (errs []error) {
	for _, addr := range []netip.Addr{a.v4, a.v6} {
		_, err := test.Ask(a.node.remote, network, addrPort(addr, port))
		errs = append(errs, err)
	}
	return errs
}

func TestGuard(t *testing.T) {
	for _, tc := range []struct {
		guard   workload.Guard
		network string
		port    uint16
		refused bool
		want    map[bpfmap.Verdict]uint64
	}{
		{workload.GuardOff, "tcp", 8080, false, map[bpfmap.Verdict]uint64{}},
		{workload.GuardOff, "udp", 8080, false, map[bpfmap.Verdict]uint64{}},
		{workload.GuardAudit, "tcp", 8080, false, map[bpfmap.Verdict]uint64{bpfmap.GuardAudited: 2}},
		{workload.GuardAudit, "udp", 8080, false, map[bpfmap.Verdict]uint64{bpfmap.GuardAudited: 2}},
		{workload.GuardAudit, "tcp", inboundPort, false, map[bpfmap.Verdict]uint64{}},
		{workload.GuardEnforce, "tcp", 8080, true, map[bpfmap.Verdict]uint64{bpfmap.RefusedGuard: 2}},
		{workload.GuardEnforce, "tcp", outboundPort, true, map[bpfmap.Verdict]uint64{bpfmap.RefusedGuard: 2}},
		{workload.GuardEnforce, "udp", 8080, true, map[bpfmap.Verdict]uint64{bpfmap.RefusedGuard: 2}},
		{workload.GuardEnforce, "tcp", 7070, false, map[bpfmap.Verdict]uint64{bpfmap.InboundExcluded: 2}},
		{workload.GuardEnforce, "udp", 7070, false, map[bpfmap.Verdict]uint64{bpfmap.InboundExcluded: 2}},
		{workload.GuardEnforce, "tcp", inboundPort, false, map[bpfmap.Verdict]uint64{}},
		{workload.GuardEnforce, "udp", 40000, false, map[bpfmap.Verdict]uint64{bpfmap.GuardEphemeral: 2}},
	} {
		t.Run(fmt.Sprintf("%s %s %d", tc.guard, tc.network, tc.port), func(t *testing.T) {
			a := guarded(t, tc.guard)
			moved := a.rose(func() {
				for _, err := range a.outside(tc.network, tc.port) {
					if tc.refused && !errors.Is(err, syscall.ECONNREFUSED) {
						t.Errorf("dial from outside: %v, want connection refused", err)
					}
					if !tc.refused && err != nil {
						t.Errorf("dial from outside: %v", err)
					}
				}
			})
			verdictsAre(t, moved, tc.want)
		})
	}
}

func TestGuardLeavesInsideAlone(t *testing.T) {
	a := guarded(t, workload.GuardEnforce)
	for _, addr := range []string{"127.0.0.1:8080", "[::1]:8080", addrPort(a.v4, 8080), addrPort(a.v6, 8080)} {
		if _, err := a.ask("tcp", addr); err != nil {
			t.Errorf("dial %s from inside: %v", addr, err)
		}
	}
	// An answer to the workload's own datagram comes back in.
	test.Echo(t, a.node.remote, "udp", addrPort(remote4(a.number), 9000))
	if _, err := a.ask("udp4", addrPort(remote4(a.number), 9000)); err != nil {
		t.Errorf("ask a server outside by UDP: %v", err)
	}
}

func TestGuardOfTransparentWorkloadTakesUDP(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	if err := n.SetMeshConfig(a.key, workload.MeshConfig{Guard: workload.GuardEnforce}); err != nil {
		t.Fatal(err)
	}
	a.serve(taskUID, a.taskCg, "udp4", "0.0.0.0:8080")
	if _, err := test.Ask(n.remote, "udp4", addrPort(a.v4, 8080)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("datagram from outside: %v, want connection refused", err)
	}
	answer, err := test.Ask(n.remote, "tcp4", addrPort(a.v4, 8080))
	if err != nil || answer.Server != a.inbound.Name {
		t.Errorf("dial from outside: %v, %s answered, want the proxy", err, answer.Server)
	}
}
