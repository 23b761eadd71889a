// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/explain"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// Explain says where the value comes from that decides, which service is meant, and whether
// somebody listens where the connection ends.
func TestExplainTellsWhatLiesBehind(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) {
		r.ExcludeOutboundPorts = []uint16{5432}
		r.ExcludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("198.51.0.0/16"), netip.MustParsePrefix("198.51.100.0/24")}
		r.ExcludeInboundPorts = []uint16{9000}
	})
	listener := netip.MustParseAddrPort("127.0.0.1:9191")
	err := n.SetMeshConfig(a.key, workload.MeshConfig{Service: "web", ExcludeInboundPorts: []uint16{9001}, Guard: workload.GuardAudit,
		Upstreams: []workload.Upstream{{Name: "db", Addresses: test.Addrs("240.0.0.5"), Listener: listener}}})
	if err != nil {
		t.Fatal(err)
	}
	a.outbound = a.serve(proxyUID, a.proxyCg, "tcp4", "127.0.0.1:15001")
	a.serve(taskUID, a.taskCg, "tcp", "[::]:9000")
	a.serve(proxyUID, a.proxyCg, "tcp4", listener.String())
	outside := netip.AddrPortFrom(remote4(a.number), 40000)
	for _, tc := range []struct {
		to   string
		from netip.AddrPort
		want explain.Explanation // with the last step alone
	}{
		{to: "203.0.113.7:80", want: explain.Explanation{Verdict: bpfmap.Redirected, SentTo: netip.MustParseAddrPort("127.0.0.1:15001"), Local: true, Listens: true,
			Steps: []explain.Step{{Rule: explain.RuleListener, Result: explain.ResultMatch, Detail: "the proxy listens on its outbound port 15001: it gets the connection", Source: explain.SourceNode}}}},
		{to: "203.0.113.7:5432", want: explain.Explanation{Verdict: bpfmap.PortExcluded,
			Steps: []explain.Step{{Rule: explain.RulePort, Result: explain.ResultMatch, Detail: "outbound port 5432 is excluded", Source: explain.SourceJob}}}},
		{to: "198.51.100.1:80", want: explain.Explanation{Verdict: bpfmap.CIDRExcluded,
			Steps: []explain.Step{{Rule: explain.RuleCIDR, Result: explain.ResultMatch, Detail: "198.51.100.1 is in the excluded CIDR 198.51.100.0/24", Source: explain.SourceJob}}}},
		{to: "240.0.0.5:5432", want: explain.Explanation{Verdict: bpfmap.ToUpstream, Service: "db", SentTo: listener, Local: true, Listens: true,
			Steps: []explain.Step{{Rule: explain.RuleUpstream, Result: explain.ResultMatch, Detail: "240.0.0.5 is a virtual IP of an upstream: sent to its listener 127.0.0.1:9191", Source: explain.SourceConsul}}}},
		{to: "127.0.0.1:9000", want: explain.Explanation{Verdict: bpfmap.Local, Local: true, Listens: true,
			Steps: []explain.Step{{Rule: explain.RuleLoopback, Result: explain.ResultMatch, Detail: "127.0.0.1 stays in the namespace", Source: ""}}}},
		{to: "127.0.0.1:9002", want: explain.Explanation{Verdict: bpfmap.Local, Local: true,
			Steps: []explain.Step{{Rule: explain.RuleLoopback, Result: explain.ResultMatch, Detail: "127.0.0.1 stays in the namespace", Source: ""}}}},
		{to: addrPort(a.v4, 9000), from: outside, want: explain.Explanation{Verdict: bpfmap.InboundExcluded, Service: "web", Local: true, Listens: true,
			Steps: []explain.Step{{Rule: explain.RulePort, Result: explain.ResultMatch, Detail: "inbound port 9000 is open: whatever listens there gets the connection", Source: explain.SourceJob}}}},
		{to: addrPort(a.v4, 9001), from: outside, want: explain.Explanation{Verdict: bpfmap.InboundExcluded, Service: "web", Local: true,
			Steps: []explain.Step{{Rule: explain.RulePort, Result: explain.ResultMatch, Detail: "inbound port 9001 is open: whatever listens there gets the connection", Source: explain.SourceConsul}}}},
		{to: addrPort(a.v4, 80), from: outside, want: explain.Explanation{Verdict: bpfmap.RefusedInboundNoProxy, Service: "web", Local: true,
			SentTo: netip.AddrPortFrom(a.v4, inboundPort),
			Steps:  []explain.Step{{Rule: explain.RuleListener, Result: explain.ResultMatch, Detail: "the proxy does not listen on port 20000", Source: explain.SourceNode}}}},
	} {
		got, err := n.Explain(a.key, explain.Connection{Destination: netip.MustParseAddrPort(tc.to), From: tc.from, UID: explain.NoUID})
		if err != nil {
			t.Errorf("%s: %v", tc.to, err)
			continue
		}
		got.Steps = got.Steps[len(got.Steps)-1:]
		if diff := cmp.Diff(tc.want, got, cmpopts.EquateComparable(netip.AddrPort{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.to, diff)
		}
	}
	// Where the programs are gone, what the rows say is not what happens.
	if _, err := n.Unload(); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Explain(a.key, explain.Connection{Destination: netip.MustParseAddrPort("203.0.113.7:80"), UID: explain.NoUID}); err == nil || !strings.Contains(err.Error(), "alloc-1") {
		t.Errorf("explain after unload: %v, want an error that names the workload", err)
	}
}
