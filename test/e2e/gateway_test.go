// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// Each kind of gateway with real traffic through it: it is recognised, its
// listeners stay reachable, what it dials is not redirected, and of the rest of
// its namespace, Envoy's administration first, the guard counts what is reached
// from outside and then refuses it.
func TestGateways(t *testing.T) {
	m := newGatewayNode(t)
	apiAlloc := m.allocate("")
	apiAlloc.startEnvoy(apiAlloc.register("api", object{"Port": 20001}))
	answer := m.serve(apiAlloc.ns, "127.0.0.1:8080", "api")
	neighbour := m.allocate("")

	gateways := []*gateway{
		m.ingress("api", answer),
		m.terminating(),
		m.apiGateway("api", answer),
		m.meshGateway("api", answer),
	}
	for _, g := range gateways {
		test.EchoProcess(t, g.spec(1000), "tcp4", fmt.Sprintf("0.0.0.0:%d", g.foreign))
		test.EchoProcess(t, g.spec(1000), "udp4", fmt.Sprintf("0.0.0.0:%d", g.foreign))
	}

	for _, g := range gateways {
		t.Run(g.kind+" in audit", func(t *testing.T) {
			g.wantServing(t, workload.GuardAudit)
			before := g.counts(t)
			for _, from := range []*test.NetNS{m.outside, neighbour.ns} {
				if status, err := ready(from, g.at(adminPort)); err != nil || status != "LIVE" {
					t.Errorf("administration from outside = %q, %v; want it reached in audit", status, err)
				}
				for _, network := range []string{"tcp4", "udp4"} {
					if _, err := test.Ask(from, network, g.at(g.foreign).String()); err != nil {
						t.Errorf("%s port %d from outside: %v; want it reached in audit", network, g.foreign, err)
					}
				}
			}
			after := g.counts(t)
			if got := after[bpfmap.GuardAudited.String()] - before[bpfmap.GuardAudited.String()]; got != 6 {
				t.Errorf("%d connections were counted as what the guard would refuse, want 6: %v", got, after)
			}
			g.wantNothingSteered(t)
		})
	}

	m.stop()
	m.config.Guard.Default = string(workload.GuardEnforce)
	m.runAgent()
	for _, g := range gateways {
		t.Run(g.kind+" in enforce", func(t *testing.T) {
			g.wantServing(t, workload.GuardEnforce)
			before := g.counts(t)
			for _, from := range []*test.NetNS{m.outside, neighbour.ns} {
				if status, err := ready(from, g.at(adminPort)); !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("administration from outside = %q, %v; want %v", status, err, syscall.ECONNREFUSED)
				}
				for _, network := range []string{"tcp4", "udp4"} {
					if answer, err := test.Ask(from, network, g.at(g.foreign).String()); !errors.Is(err, syscall.ECONNREFUSED) {
						t.Errorf("%s port %d from outside = %+v, %v; want %v", network, g.foreign, answer, err, syscall.ECONNREFUSED)
					}
				}
			}
			after := g.counts(t)
			if got := after[bpfmap.RefusedGuard.String()] - before[bpfmap.RefusedGuard.String()]; got != 6 {
				t.Errorf("%d connections were counted as refused by the guard, want 6: %v", got, after)
			}
			if got := after[bpfmap.GuardAudited.String()] - before[bpfmap.GuardAudited.String()]; got != 0 {
				t.Errorf("%d connections were let in all the same", got)
			}
			// From inside, nothing is the guard's business.
			for _, addr := range []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), g.addr} {
				if status, err := ready(g.ns, netip.AddrPortFrom(addr, adminPort)); err != nil || status != "LIVE" {
					t.Errorf("administration from inside by %s = %q, %v", addr, status, err)
				}
			}
			g.wantNothingSteered(t)
		})
	}
}

// wantServing waits until the gateway is what the agent makes of it, and checks
// that traffic passes through it and that its listeners are open to everybody.
func (g *gateway) wantServing(t *testing.T, guard workload.Guard) {
	t.Helper()
	var view api.WorkloadView
	test.Eventually(t, func() (err error) {
		view, err = g.view()
		if err == nil && (view.State != api.StateManaged || !view.InSync || view.Guard != guard || !slices.Equal(view.Open, g.open)) {
			err = fmt.Errorf("the agent shows %+v", view)
		}
		return err
	}, fmt.Sprintf("the %s to be open at %v", g.kind, g.open))
	if view.Mode != workload.ModeGateway || len(view.Problems) > 0 || len(view.Proxies) != 1 || view.Proxies[0].Kind != g.kind+"-gateway" {
		t.Errorf("the agent shows %+v; want one %s gateway without problems", view, g.kind)
	}
	if w, err := g.workload(); err != nil || w.Mode != workload.ModeGateway || w.Guard != guard || len(w.Problems) > 0 {
		t.Errorf("the kernel has %+v, %v; want mode gateway without problems", w, err)
	}
	before := g.counts(t)
	test.Eventually(t, func() error { return g.traffic() }, "traffic through the gateway")
	for _, port := range g.listeners {
		if err := dials(g.node.outside, g.at(port)); err != nil {
			t.Errorf("listener %d from outside: %v", port, err)
		}
	}
	g.wantSince(t, before, bpfmap.InboundExcluded)
}

// wantNothingSteered checks that what is dialled in the gateway's namespace, by
// Envoy and by a task, goes where it was dialled.
func (g *gateway) wantNothingSteered(t *testing.T) {
	t.Helper()
	before := g.counts(t)
	answer, err := g.client.Ask("tcp4", g.elsewhere.Addr.String())
	if err != nil || answer.Server != g.elsewhere.Name || answer.Peer.Addr() != g.addr {
		t.Errorf("a task that dials %s is answered %+v, %v; want that server, which sees %s", g.elsewhere.Addr, answer, err, g.addr)
	}
	g.wantSince(t, before, bpfmap.Direct)
	after := g.counts(t)
	for _, verdict := range []bpfmap.Verdict{bpfmap.Redirected, bpfmap.ToUpstream, bpfmap.ToDNS} {
		if count := after[verdict.String()]; count > 0 {
			t.Errorf("%d connections are counted as %s: %s", count, verdict, verdict.Describe())
		}
	}
	for _, verdict := range bpfmap.AllVerdicts() {
		if count := after[verdict.String()]; verdict.Refused() && verdict != bpfmap.RefusedGuard && count > 0 {
			t.Errorf("%d connections are counted as %s: %s", count, verdict, verdict.Describe())
		}
	}
}

// wantSince checks that a verdict was given since the counts were read.
func (g *gateway) wantSince(t *testing.T, before map[string]uint64, verdict bpfmap.Verdict) {
	t.Helper()
	if after := g.counts(t); after[verdict.String()] <= before[verdict.String()] {
		t.Errorf("%s was counted %d times before and %d after", verdict, before[verdict.String()], after[verdict.String()])
	}
}
