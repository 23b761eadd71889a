// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// configured is a node of one transparent allocation, whose sidecar has an upstream, an
// exposed path and ports of its own, under a guard; an agent has put all of that in force.
func configured(t *testing.T) (n *node, a *Agent, ns *test.NetNS, before inspect.Record) {
	t.Helper()
	n = newNode(t)
	n.config.Guard.Default, n.ports = "enforce", []any{mapped(20002)}
	id := numbered(1)
	ns, _ = n.transparent(id)
	n.fake.chain = say(200, `{"Chain":{"AutoVirtualIPs":["240.0.0.1"]}}`)
	n.fake.answers(say(200, fmt.Sprintf(`{"_nomad-task-%s-group-g-web-80-sidecar-proxy": {"Kind": "connect-proxy", "Service": "web-sidecar-proxy", "Port": 20002, "Proxy": {
		"Mode": "transparent", "DestinationServiceName": "web", "TransparentProxy": {"OutboundListenerPort": 15002},
		"Expose": {"Paths": [{"ListenerPort": 8181}]}, "Upstreams": [{"DestinationName": "db", "LocalBindPort": 9191}]}}}`, id)))
	a = n.newStepwise()
	test.Eventually(t, func() error {
		a.asks(t.Context())
		before = n.only()
		if o := before.MeshConfig; len(o.Upstreams) != 1 || o.Guard != workload.GuardEnforce {
			return fmt.Errorf("it is %+v", o)
		}
		return nil
	}, "what Consul adds to be in force")
	want := workload.MeshConfig{
		InboundPort: 20002, OutboundPort: 15002, ExcludeInboundPorts: before.MeshConfig.ExcludeInboundPorts, ExposedPorts: []uint16{8181}, Guard: workload.GuardEnforce,
		Upstreams: []workload.Upstream{{Name: "db", Addresses: addrs("240.0.0.1"), Listener: netip.MustParseAddrPort("127.0.0.1:9191")}},
	}
	wantMesh(t, want, before.MeshConfig)
	return n, a, ns, before
}

func wantMesh(t *testing.T, want, got workload.MeshConfig) {
	t.Helper()
	if diff := cmp.Diff(want, got, sameAddrs()); diff != "" {
		t.Errorf("what Consul adds, on record (-want +got):\n%s", diff)
	}
}

// only is the record of the one allocation.
func (n *node) only() inspect.Record {
	n.t.Helper()
	list, err := n.Records()
	if err != nil || len(list) != 1 {
		n.t.Fatalf("on record: %+v, %v; want one", list, err)
	}
	return list[0]
}

// A record that is lost comes back with all that was in force, in the one pass that makes
// it anew: also where Consul has nothing to say any more, or is gone and the agent began
// after it, of which the guard is left.
func TestRestoredRecordHasWhatConsulAdds(t *testing.T) {
	for _, c := range []struct {
		name string
		then func(*node, *Agent) *Agent
		want func(before workload.MeshConfig) workload.MeshConfig
	}{
		{"Consul answers", func(_ *node, a *Agent) *Agent { return a }, func(before workload.MeshConfig) workload.MeshConfig { return before }},
		{"Consul answers an agent that began after the loss", func(n *node, _ *Agent) *Agent {
			a := n.newStepwise()
			a.consul.Read(n.t.Context())
			a.consul.Look(n.t.Context())
			return a
		}, func(before workload.MeshConfig) workload.MeshConfig { return before }},
		{"the registration is gone", func(n *node, a *Agent) *Agent {
			n.fake.answers(say(200, "{}"))
			a.consul.Read(n.t.Context())
			return a
		}, func(before workload.MeshConfig) workload.MeshConfig { return before }},
		{"Consul is gone and the agent began after that", func(n *node, _ *Agent) *Agent {
			n.fake.answers(say(500, "no cluster leader"))
			return n.newStepwise()
		}, func(workload.MeshConfig) workload.MeshConfig {
			return workload.MeshConfig{Guard: workload.GuardEnforce}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			n, a, _, before := configured(t)
			if err := n.RejectProxyCgroup(before.Key, 4711); err != nil {
				t.Fatal(err)
			}
			a.reconcile(time.Now())
			if err := os.RemoveAll(filepath.Join(n.config.StateDir, "workloads")); err != nil {
				t.Fatal(err)
			}
			next := c.then(n, a)
			now := time.Now()
			next.reconcile(now)
			if list, err := n.Records(); err != nil || len(list) > 0 {
				t.Fatalf("on record: %+v, %v; want nothing before it counts as lost", list, err)
			}
			next.reconcile(now.Add(recordGrace))
			got := n.only()
			wantMesh(t, c.want(before.MeshConfig), got.MeshConfig)
			if remembered := slices.Equal(got.RejectedCgroups, []uint64{4711}); remembered != (next == a) {
				t.Errorf("rejected cgroups are %d; want the one that this agent knew: %t", got.RejectedCgroups, next == a)
			}
			if state := next.Status().Workloads[0].State; state != api.StateManaged {
				t.Errorf("it is %s, want it managed", state)
			}
		})
	}
}

// The record of a namespace that took another's place has what Consul adds, too.
func TestReplacedNamespaceHasWhatConsulAdds(t *testing.T) {
	for name, answer := range map[string]bool{"Consul answers": true, "the registration is gone": false} {
		t.Run(name, func(t *testing.T) {
			n, a, first, before := configured(t)
			if !answer {
				n.fake.answers(say(200, "{}"))
				a.consul.Read(t.Context())
			}
			second := test.NewNetNS(t)
			n.result(numbered(1), second.Path, transparentMesh, addressed(t, second))
			first.End()
			a.reconcile(time.Now())
			got := n.only()
			if got.Cookie != second.Cookie() {
				t.Fatalf("on record is namespace %d, want %d", got.Cookie, second.Cookie())
			}
			wantMesh(t, before.MeshConfig, got.MeshConfig)
		})
	}
}

// The guards of a restored record are the strictest of the operator's and the job's.
func TestRestoredGuards(t *testing.T) {
	for _, c := range []struct{ node, job, want workload.Guard }{
		{workload.GuardAudit, workload.GuardEnforce, workload.GuardEnforce},
		{workload.GuardEnforce, workload.GuardAudit, workload.GuardEnforce},
	} {
		asked := workload.Request{Mode: workload.ModeTransparent, Guard: c.job, Egress: c.job}
		got := desired.Restored(desired.Allocation{Attachment: found()}, &asked, inspect.Record{}, catalog.Data{}, desired.Policy{Guard: c.node, Egress: c.node})
		if got.Guard != c.want || got.Egress != c.want {
			t.Errorf("node %s, job %s: guards %s and %s, want %s", c.node, c.job, got.Guard, got.Egress, c.want)
		}
	}
}
