// SPDX-License-Identifier: MPL-2.0

package main

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/cmd/weir/look"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

func TestWorkloadsShowTheAgentsView(t *testing.T) {
	began := time.Now().Add(-time.Minute)
	key := workload.AttachmentID{ContainerID: "0b5d0c1e-7c0f", IfName: "eth0"}
	view := &api.Status{
		Consul: api.ConsulStatus{Enabled: true, Address: "127.0.0.1:8500", InSync: true, Since: began},
		Workloads: []api.WorkloadView{
			{
				Key: key, ID: "0b5d0c1e-7c0f", Job: "demo", Group: "web", State: api.StateManaged, Guard: workload.GuardAudit, InSync: true, Since: began,
				Proxies:   []api.ProxyView{{Kind: "connect-proxy"}},
				Upstreams: []api.UpstreamView{{Name: "api", Listener: netip.MustParseAddrPort("127.0.0.1:9191")}}, Open: []uint16{8081, 21500},
			},
			{ID: "1c6e1d2f", State: api.StateUnprotected, Since: began, Problems: []health.Problem{{What: "no namespace", Remedy: "set cache_dir"}}},
		},
	}
	n := &node{list: []inspect.WorkloadStatus{{Key: key, ID: "0b5d0c1e-7c0f", Job: "demo", Group: "web", Mode: workload.ModeDirect, Guard: workload.GuardAudit,
		Proxy: inspect.ProxyStatus{UID: 101, Identity: inspect.IdentityUID}}}, agent: view}
	got := try(t, n, nil, "workloads")
	for _, want := range []string{
		"\nagent: in sync with Consul at 127.0.0.1:8500 for 1m0s\n",
		"0b5d0c1e  demo  web    audit      guard  -      audit  in sync\n",
		"1c6e1d2f  -     -      no         -      -      -      absent\n",
		"\n  no namespace\n    remedy: set cache_dir\n",
	} {
		if !strings.Contains(got.stdout, want) {
			t.Errorf("output lacks %q:\n%s", want, got.stdout)
		}
	}
	got = try(t, n, nil, "workloads", "-verbose")
	for _, want := range []string{
		"0b5d0c1e-7c0f  demo  web    audit      guard  managed      direct  connect-proxy  -     -      101        uid ",
		" in sync  1m0s   api=127.0.0.1:9191  8081 21500\n",
	} {
		if !strings.Contains(got.stdout, want) {
			t.Errorf("output lacks %q:\n%s", want, got.stdout)
		}
	}
	var told struct {
		Workloads []struct {
			ID    string
			Mode  string
			Agent *api.WorkloadView
		}
	}
	if err := json.Unmarshal([]byte(try(t, n, nil, "workloads", "-json").stdout), &told); err != nil {
		t.Fatal(err)
	}
	list := told.Workloads
	if len(list) != 2 || list[0].Mode != "direct" || list[0].Agent == nil || !list[0].Agent.InSync {
		t.Fatalf("JSON = %+v, want the workload with the agent's view, and what is no workload", list)
	}
	if diff := cmp.Diff(&view.Workloads[1], list[1].Agent, cmpopts.EquateComparable(netip.AddrPort{}), cmpopts.EquateEmpty(), cmpopts.EquateApproxTime(0)); list[1].ID != "1c6e1d2f" || diff != "" {
		t.Errorf("JSON of the unprotected allocation %s (-want +got):\n%s", list[1].ID, diff)
	}
}

// Allocations from before Weir are listed as what they are.
func TestAllocationsOfConsulsOwnRules(t *testing.T) {
	view := &api.Status{Workloads: []api.WorkloadView{{
		Key: workload.AttachmentID{ContainerID: "1c6e1d2f", IfName: "eth0"}, ID: "1c6e1d2f", Job: "demo", State: api.StateConsul, Since: time.Now(),
	}}}
	n := &node{agent: view}
	const summary = "agent: 1 allocation redirected by Consul's own rules, as before, until Nomad\n  starts a new one in the place of each\n"
	if got := try(t, n, nil, "status"); !strings.Contains(got.stdout+"\n", summary) {
		t.Errorf("status lacks %q:\n%s", summary, got.stdout)
	}
	if got := try(t, n, nil, "workloads"); !strings.Contains(got.stdout, "1c6e1d2f  demo  -      no         consul  -      -      absent\n") {
		t.Errorf("workloads does not list it:\n%s", got.stdout)
	}
	var told struct {
		Workloads []struct {
			ID    string
			Agent *api.WorkloadView
		}
	}
	got := try(t, n, nil, "workloads", "-json")
	if err := json.Unmarshal([]byte(got.stdout), &told); err != nil || len(told.Workloads) != 1 || told.Workloads[0].ID != "1c6e1d2f" || told.Workloads[0].Agent.State != api.StateConsul {
		t.Errorf("JSON = %s, %v; want the allocation", got.stdout, err)
	}
}

func TestStatusEndsWithTheAgentsSummary(t *testing.T) {
	view := &api.Status{
		Consul: api.ConsulStatus{Enabled: true, Address: "127.0.0.1:8500"}, Docker: "dial: no answer",
		Counts: api.Counts{Repaired: 3, Pruned: 1},
		Workloads: []api.WorkloadView{
			{State: api.StateUnprotected}, {State: api.StateManaged}, {State: api.StateHost}, {State: api.StateUnclaimed}, {State: api.StateUnclaimed},
		},
	}
	got := try(t, &node{agent: view}, nil, "status").stdout
	for _, want := range []string{
		"\nagent: asking Consul at 127.0.0.1:8500\n", "agent: Docker's containers may be other ones by now: dial: no answer\n",
		"agent: 1 allocation of the mesh not under Weir, see 'weir workloads'\n", "agent: 3 repairs since it began, 1 workload forgotten whose namespace died\n",
		"agent: 1 gateway on the node's own network, where there is nothing to redirect\n  or guard\n",
		"agent: 2 registrations of a proxy in Consul that no allocation of this node is\n  known to run, see 'weir workloads'\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("output lacks %q:\n%s", want, got)
		}
	}
}

func TestConsulLine(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		consul api.ConsulStatus
		want   string
	}{
		{api.ConsulStatus{}, "agent: Consul sync is disabled"},
		{api.ConsulStatus{Enabled: true, Address: "a:1"}, "agent: asking Consul at a:1"},
		{api.ConsulStatus{Enabled: true, Address: "a:1", InSync: true, Hidden: true}, "agent: Consul at a:1 hides services of this node from the token"},
		{api.ConsulStatus{Enabled: true, Address: "a:1", Error: "hang", Since: now.Add(-time.Second)}, "agent: not in sync with Consul at a:1 for 1s: hang"},
	} {
		command := &base.Command{Env: base.Env{Getenv: func(string) string { return "" }}}
		if got := look.ConsulLine(command, c.consul, now); got != c.want {
			t.Errorf("line = %q, want %q", got, c.want)
		}
	}
}

func TestAgentRefusesWhatItCannotWorkWith(t *testing.T) {
	got := try(t, &node{}, map[string]string{"CONSUL_HTTP_SSL": "perhaps"}, "agent")
	if got.code != 1 || !strings.Contains(got.stderr, "CONSUL_HTTP_SSL") {
		t.Errorf("outcome = %+v, want the variable named", got)
	}
	got = try(t, &node{}, nil, "agent", "-guard", "on", "-telemetry", "9902", "-consul", "ftp://x:1")
	for _, want := range []string{"guard.default", "telemetry.listen", "consul.address"} {
		if got.code != 1 || !strings.Contains(got.stderr, want) {
			t.Errorf("outcome = %+v, want %s named", got, want)
		}
	}
}
