// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"log/slog"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/flow"
	"github.com/weirmesh/weir/redirect/bpfmap"
)

// apiOnly is an agent of which the local API alone runs.
func apiOnly(t *testing.T, change ...func(*configfile.Config)) *Agent {
	t.Helper()
	config := configfile.DefaultConfig()
	config.StateDir, config.Consul.Enabled, config.Docker.Socket = t.TempDir(), false, ""
	for _, edit := range change {
		edit(&config)
	}
	a, err := New(config, Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.server.Listen(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.server.Close(); err != nil {
			t.Error(err)
		}
	})
	return a
}

// Connections are counted by their ends, whatever process made them; what is older, what
// is none and what is lost is not among them. An allocation that dials many places takes
// none from another.
func TestTraffic(t *testing.T) {
	a := apiOnly(t)
	shop, scan := &flow.Workload{Cookie: 1, AllocID: "a1", Job: "shop"}, &flow.Workload{Cookie: 2, AllocID: "a2", Job: "scan"}
	now := time.Now()
	put := func(ago time.Duration, r flow.Record) {
		r.At = now.Add(-ago).UnixNano()
		a.flows.Ring.Append(r)
	}
	dial := func(of *flow.Workload, to string, verdict bpfmap.Verdict, pid uint32) (r flow.Record) {
		r = flow.Record{Workload: of, Verdict: verdict, Pid: pid, Uid: 1000}
		r.Origin, r.OriginPort, r.Valid[1] = flow.PackAddr(netip.MustParseAddrPort(to))
		return r
	}
	put(time.Hour/2, dial(shop, "10.0.0.1:80", bpfmap.Redirected, 1))
	for pid := range uint32(3) {
		put(time.Second, dial(shop, "10.0.0.1:80", bpfmap.Redirected, pid+1))
	}
	put(time.Second, dial(shop, "10.0.0.2:80", bpfmap.RefusedNoProxy, 1))
	put(time.Second, dial(shop, "10.0.0.2:80", bpfmap.Listener, 1))
	put(time.Second, flow.Record{Workload: shop, Verdict: bpfmap.EventsLost, Lost: 7})
	for port := range uint16(2 * flow.GuardShare) {
		put(time.Second, dial(scan, netip.AddrPortFrom(netip.MustParseAddr("10.0.0.9"), port+1).String(), bpfmap.Redirected, 1))
	}
	put(time.Second, dial(shop, "10.0.0.3:80", bpfmap.Redirected, 1))

	since := now.Add(-time.Minute)
	got, err := api.ReadTraffic(t.Context(), a.config.StateDir, since)
	if err != nil {
		t.Fatal(err)
	}
	counts := make(map[string]uint64)
	var scans int
	for _, edge := range got.Edges {
		if edge.Source.Job == "scan" {
			scans++
			continue
		}
		counts[edge.Destination.IP.String()+" "+edge.Verdict] += edge.Count
	}
	want := map[string]uint64{"10.0.0.1 redirected": 3, "10.0.0.2 refused_no_proxy": 1, "10.0.0.3 redirected": 1}
	if diff := cmp.Diff(want, counts); diff != "" {
		t.Errorf("edges (-want +got):\n%s", diff)
	}
	if scans != flow.GuardShare || got.Omitted != flow.GuardShare || got.Lost != 7 || !got.Since.Equal(since) {
		t.Errorf("%d ends of the scan, %d omitted, %d lost, since %s: want %d, as many, 7, since %s", scans, got.Omitted, got.Lost, got.Since, flow.GuardShare, since)
	}
	if got.Schema != 1 || got.Problem != "" || got.Agent.PID != os.Getpid() || got.Agent.CPU <= 0 || got.Agent.Memory < 1<<20 {
		t.Errorf("traffic: schema %d, problem %q, agent %+v", got.Schema, got.Problem, got.Agent)
	}
}

// A node whose agent has more than can be gone through tells of the newest, and since
// when.
func TestTrafficOfTooMuch(t *testing.T) {
	a := apiOnly(t)
	a.flows.Ring = flow.NewRing((flow.TrafficRecords+50_000)*flow.RecordSize, time.Hour)
	began := time.Now().Add(-time.Minute)
	for i := range flow.TrafficRecords + 10_000 {
		a.flows.Ring.Append(flow.Record{At: began.Add(time.Duration(i) * time.Microsecond).UnixNano(), Workload: &flow.Workload{Cookie: 1}, Verdict: bpfmap.Redirected})
	}
	got, err := api.ReadTraffic(t.Context(), a.config.StateDir, began)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Edges) != 1 || got.Edges[0].Count != flow.TrafficRecords || !got.Since.Equal(began.Add(10*time.Millisecond)) {
		t.Errorf("%+v since %s: want %d connections since 10 ms after %s", got.Edges, got.Since, flow.TrafficRecords, began)
	}
}

// Without a record of flows the agent still tells what it costs.
func TestTrafficWithoutFlows(t *testing.T) {
	a := apiOnly(t, func(c *configfile.Config) { c.Flows.Enabled = false })
	got, err := api.ReadTraffic(t.Context(), a.config.StateDir, time.Now())
	if err != nil || got.Problem != api.ErrFlowsOff.Error() || len(got.Edges) > 0 || got.Agent.PID != os.Getpid() {
		t.Errorf("traffic = %+v, %v; want the problem that nothing is recorded", got, err)
	}
}
