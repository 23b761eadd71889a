// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/bpfmap"
)

// apiOnly is an agent of which the local API alone runs.
func apiOnly(t *testing.T, change ...func(*Config)) *Agent {
	t.Helper()
	config := DefaultConfig()
	config.StateDir, config.Consul.Enabled, config.Docker.Socket = t.TempDir(), false, ""
	for _, edit := range change {
		edit(&config)
	}
	a, err := New(config, Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	listener, err := listenLocal(a.socketPath())
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: a.localAPI()}
	go func() { _ = server.Serve(listener) }() // until it is closed
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
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
	shop, scan := &flowWorkload{cookie: 1, allocID: "a1", job: "shop"}, &flowWorkload{cookie: 2, allocID: "a2", job: "scan"}
	now := time.Now()
	put := func(ago time.Duration, r flowRecord) {
		r.at = now.Add(-ago).UnixNano()
		a.flows.ring.append(r)
	}
	dial := func(of *flowWorkload, to string, verdict bpfmap.Verdict, pid uint32) (r flowRecord) {
		r = flowRecord{workload: of, verdict: verdict, pid: pid, uid: 1000}
		r.origin, r.originPort, r.valid[1] = packAddr(netip.MustParseAddrPort(to))
		return r
	}
	put(time.Hour/2, dial(shop, "10.0.0.1:80", bpfmap.Redirected, 1))
	for pid := range uint32(3) {
		put(time.Second, dial(shop, "10.0.0.1:80", bpfmap.Redirected, pid+1))
	}
	put(time.Second, dial(shop, "10.0.0.2:80", bpfmap.RefusedNoProxy, 1))
	put(time.Second, dial(shop, "10.0.0.2:80", bpfmap.Listener, 1))
	put(time.Second, flowRecord{workload: shop, verdict: bpfmap.EventsLost, lost: 7})
	for port := range uint16(2 * guardShare) {
		put(time.Second, dial(scan, netip.AddrPortFrom(netip.MustParseAddr("10.0.0.9"), port+1).String(), bpfmap.Redirected, 1))
	}
	put(time.Second, dial(shop, "10.0.0.3:80", bpfmap.Redirected, 1))

	since := now.Add(-time.Minute)
	got, err := ReadTraffic(t.Context(), a.config.StateDir, since)
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
	if scans != guardShare || got.Omitted != guardShare || got.Lost != 7 || !got.Since.Equal(since) {
		t.Errorf("%d ends of the scan, %d omitted, %d lost, since %s: want %d, as many, 7, since %s", scans, got.Omitted, got.Lost, got.Since, guardShare, since)
	}
	if got.Schema != 1 || got.Problem != "" || got.Agent.PID != os.Getpid() || got.Agent.CPU <= 0 || got.Agent.Memory < 1<<20 {
		t.Errorf("traffic: schema %d, problem %q, agent %+v", got.Schema, got.Problem, got.Agent)
	}
}

// A node whose agent has more than can be gone through tells of the newest, and since
// when.
func TestTrafficOfTooMuch(t *testing.T) {
	a := apiOnly(t)
	a.flows.ring = newFlowRing((trafficRecords+50_000)*flowRecordSize, time.Hour)
	began := time.Now().Add(-time.Minute)
	for i := range trafficRecords + 10_000 {
		a.flows.ring.append(flowRecord{at: began.Add(time.Duration(i) * time.Microsecond).UnixNano(), workload: &flowWorkload{cookie: 1}, verdict: bpfmap.Redirected})
	}
	got, err := ReadTraffic(t.Context(), a.config.StateDir, began)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Edges) != 1 || got.Edges[0].Count != trafficRecords || !got.Since.Equal(began.Add(10*time.Millisecond)) {
		t.Errorf("%+v since %s: want %d connections since 10 ms after %s", got.Edges, got.Since, trafficRecords, began)
	}
}

// Without a record of flows the agent still tells what it costs.
func TestTrafficWithoutFlows(t *testing.T) {
	a := apiOnly(t, func(c *Config) { c.Flows.Enabled = false })
	got, err := ReadTraffic(t.Context(), a.config.StateDir, time.Now())
	if err != nil || got.Problem != ErrFlowsOff.Error() || len(got.Edges) > 0 || got.Agent.PID != os.Getpid() {
		t.Errorf("traffic = %+v, %v; want the problem that nothing is recorded", got, err)
	}
}
