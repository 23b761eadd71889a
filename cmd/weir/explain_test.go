// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/cli"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/look"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/explain"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// explainNode has two allocations of one job and one of another.
func explainNode() *node {
	known := func(id, job string) inspect.Record {
		return inspect.Record{
			Key: workload.AttachmentID{ContainerID: id, IfName: "eth0"},
			Request: workload.Request{Job: workload.Job{ID: job, Group: "web", AllocID: id}, ProxyUID: 101,
				Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.2")}},
			MeshConfig: workload.MeshConfig{Upstreams: []workload.Upstream{
				{Name: "db", Addresses: []netip.Addr{netip.MustParseAddr("240.0.0.5")}, Listener: netip.MustParseAddrPort("127.0.0.1:9191")},
				{Name: "cache", Listener: netip.MustParseAddrPort("127.0.0.1:9192")},
			}},
		}
	}
	return &node{
		known: []inspect.Record{known("0b5d0c1e-7c0f", "demo"), known("0b5e2222-7c0f", "demo"), known("1c6e1d2f-7c0f", "other")},
		agent: &api.Status{Workloads: []api.WorkloadView{
			{Key: workload.AttachmentID{ContainerID: "1c6e1d2f-7c0f", IfName: "eth0"}, ID: "1c6e1d2f-7c0f", State: api.StateManaged, Task: "connect-proxy-api",
				Upstreams: []api.UpstreamView{{Name: "far", VirtualIPs: []netip.Addr{netip.MustParseAddr("240.0.0.9")}}}},
			{ID: "2d7f3333-7c0f", Job: "plain", State: api.StateUnprotected},
		}},
		explanation: explain.Explanation{Verdict: bpfmap.Redirected, Local: true, Listens: true,
			SentTo: netip.MustParseAddrPort("127.0.0.1:15001"),
			Steps:  []explain.Step{{Rule: explain.RuleListener, Result: explain.ResultMatch, Detail: "the proxy listens", Source: explain.SourceNode}}},
	}
}

// agentBehind is what the agent answers of what Consul says.
func (n *node) agentBehind(_ context.Context, _ string, query api.BehindQuery) (api.Behind, error) {
	n.queries = append(n.queries, query)
	if n.behind == nil {
		return api.Behind{}, fmt.Errorf("%w: %w", api.ErrNotRunning, fs.ErrNotExist)
	}
	return *n.behind, nil
}

func TestExplainNamesTheAllocation(t *testing.T) {
	for _, tc := range []struct{ operand, problem string }{
		{"0b5d", ""},
		{"1c6e1d2f-7c0f", ""},
		{"other", ""},
		{"0b5", `"0b5" is the beginning of 2 allocations' IDs, so give more of it`},
		{"demo", `"demo" is several: name one of demo/web/0b5d0c1e, demo/web/0b5e2222`},
		{"plain", "allocation 2d7f3333 is not under Weir (unprotected)"},
		{"nobody", `"nobody" is no job and no beginning of an allocation's ID on this node`},
	} {
		got := try(t, explainNode(), nil, "explain", tc.operand, "203.0.113.7:80")
		if tc.problem == "" && got.code != 0 || tc.problem != "" && (got.code != 1 || !strings.Contains(got.stderr, tc.problem)) {
			t.Errorf("explain %s: %+v, want %q", tc.operand, got, tc.problem)
		}
	}
}

// A connection that the start gate holds is not refused yet, and explain says so.
func TestExplainSaysThatItIsHeld(t *testing.T) {
	const wanted = "Not yet: the start gate is open, so the connection waits for the proxy to\n  listen."
	for _, held := range []bool{true, false} {
		n := explainNode()
		n.explanation.Verdict, n.explanation.Listens, n.explanation.Held = bpfmap.RefusedNoProxy, false, held
		got := try(t, n, nil, "explain", "other", "203.0.113.7:80")
		if strings.Contains(got.stdout, wanted) != held {
			t.Errorf("held %t: explain says\n%s\nwant only then: %s", held, got.stdout, wanted)
		}
		var told struct{ Held bool }
		if err := json.Unmarshal([]byte(try(t, n, nil, "explain", "-json", "other", "203.0.113.7:80").stdout), &told); err != nil || told.Held != held {
			t.Errorf("held %t: JSON says %+v, %v", held, told, err)
		}
	}
}

func TestExplainReadsTheConnection(t *testing.T) {
	outside := func(from, to string) explain.Connection {
		return explain.Connection{From: netip.AddrPortFrom(netip.MustParseAddr(from), 0), Destination: netip.MustParseAddrPort(to), UID: explain.NoUID}
	}
	to := func(text string) explain.Connection {
		return explain.Connection{Destination: netip.MustParseAddrPort(text), UID: explain.NoUID}
	}
	asUID, asProxy := to("1.2.3.4:5"), to("1.2.3.4:5")
	asUID.UID, asUID.IPv6Socket, asProxy.UID, asProxy.Proxy = 1000, true, 101, true
	for _, tc := range []struct {
		args    string
		want    explain.Connection
		problem string
	}{
		{"other 1.2.3.4:5", to("1.2.3.4:5"), ""},
		{"other [2001:db8::1]:5", to("[2001:db8::1]:5"), ""},
		{"other 1.2.3.4:5 -uid 1000 -ipv6-socket", asUID, ""},
		{"-task connect-proxy-api other 1.2.3.4:5", asProxy, ""},
		{"-task web other 1.2.3.4:5", to("1.2.3.4:5"), ""},
		{"other db", to("240.0.0.5:9191"), ""},
		{"other db.virtual.consul:5432", to("240.0.0.5:5432"), ""},
		{"other cache", to("127.0.0.1:9192"), ""},
		{"-inbound -from 10.0.0.9 other 8080", outside("10.0.0.9", "10.0.0.2:8080"), ""},
		{"-inbound other 10.0.0.2:8080", outside("192.0.2.1", "10.0.0.2:8080"), ""},
		{"other 1.2.3.4", explain.Connection{}, "name a port too"},
		{"other unheard", explain.Connection{}, "any other needs a port"},
		{"other db:many", explain.Connection{}, "want ADDR:PORT or NAME[:PORT]"},
		{"-uid me other 1.2.3.4:5", explain.Connection{}, "want a number"},
		{"-from 10.0.0.9 other 1.2.3.4:5", explain.Connection{}, "it needs -inbound"},
		{"-inbound -from here other 80", explain.Connection{}, "want an address"},
		{"other 1.2.3.4:5 more", explain.Connection{}, `unexpected argument "more"`},
		{"", explain.Connection{}, "name an allocation"},
	} {
		n := explainNode()
		got := try(t, n, nil, append([]string{"explain"}, strings.Fields(tc.args)...)...)
		if tc.problem != "" {
			if got.code != 1 || !strings.Contains(got.stderr, tc.problem) {
				t.Errorf("explain %s: %+v, want %q", tc.args, got, tc.problem)
			}
			continue
		}
		if got.code != 0 || len(n.asked) != 1 || n.asked[0] != tc.want {
			t.Errorf("explain %s: %+v asked %+v, want %+v", tc.args, got, n.asked, tc.want)
		}
	}
}

func TestExplainAsJSON(t *testing.T) {
	n := explainNode()
	n.behind = &api.Behind{Service: "far", Source: "api", Intention: api.IntentionDeny, Instances: &api.Instances{Passing: 1, Total: 2}}
	const want = `{
  "schema": 1,
  "alloc_id": "1c6e1d2f-7c0f",
  "verdict": "redirected",
  "refused": false,
  "held": false,
  "steps": [
    {
      "rule": "listener",
      "result": "match",
      "detail": "the proxy listens",
      "source": "node"
    }
  ],
  "sent_to": "127.0.0.1:15001",
  "listens": true,
  "service": "far",
  "intention": "deny",
  "instances": {
    "passing": 1,
    "warning": 0,
    "total": 2
  },
  "unknown": [],
  "remedy": "let an intention allow it: 'consul intention create -allow api far'",
  "settings": []
}
`
	if diff := cmp.Diff(want, try(t, n, nil, "explain", "-json", "other", "240.0.0.9:80").stdout); diff != "" {
		t.Errorf("JSON (-want +got):\n%s", diff)
	}
}

// Consul's word on what lies behind is asked for where the proxy makes the connection, and it
// counts: denied is not allowed, and what could not be looked at is neither.
func TestExplainSaysWhatConsulDoes(t *testing.T) {
	to := netip.MustParseAddrPort("240.0.0.9:80")
	redirected := explain.Explanation{Verdict: bpfmap.Redirected, Local: true, Listens: true, SentTo: netip.MustParseAddrPort("127.0.0.1:15001")}
	asked := []api.BehindQuery{{Key: explainNode().known[2].Key, To: to, SentTo: redirected.SentTo, Service: "far"}}
	for _, tc := range []struct {
		name        string
		explanation explain.Explanation
		behind      api.Behind
		code        int
		says        string // after the line of the service
		asked       []api.BehindQuery
	}{
		{"allowed", redirected, api.Behind{Service: "far", Source: "api", Intention: api.IntentionAllow, Instances: &api.Instances{Passing: 1, Warning: 1, Total: 3}}, 0,
			"Service: far\nIntention: Consul lets api dial far.\nInstances: 1 of 3 passing, 1 with a warning\n", asked},
		{"denied", redirected, api.Behind{Service: "far", Source: "api", Intention: api.IntentionDeny, Instances: &api.Instances{Passing: 3, Total: 3}}, 2,
			"Service: far\nIntention: Consul denies api the service far, whose proxies refuse it.\nInstances: 3 of 3 passing\n" +
				"Remedy: let an intention allow it: 'consul intention create -allow api far'\n", asked},
		{"some requests", redirected, api.Behind{Service: "far", Source: "api", Intention: api.IntentionByRequest}, 0,
			"Service: far\nIntention: Consul lets api dial far for some requests, by method, path or\n  header.\n", asked},
		{"nobody healthy", redirected, api.Behind{Service: "far", Source: "api", Intention: api.IntentionAllow, Instances: &api.Instances{Total: 2}}, 2,
			"Service: far\nIntention: Consul lets api dial far.\nInstances: 0 of 2 passing\nRemedy: see the checks of service far in Consul, and whether its job runs\n", asked},
		{"not looked at", redirected, api.Behind{Service: "far", Unknown: []api.Unknown{{What: "intention", Why: "Consul forbids it", Remedy: "give the right"}}}, 0,
			"Service: far\nNot looked at: the intention: Consul forbids it. Remedy: give the right\n", asked},
		{"past the proxy", explain.Explanation{Verdict: bpfmap.PortExcluded}, api.Behind{Intention: api.IntentionDeny}, 0,
			"Verdict: port_excluded (left alone: its port is excluded)\nService: far\n", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := explainNode()
			n.explanation, n.behind = tc.explanation, &tc.behind
			got := try(t, n, nil, "explain", "other", to.String())
			if got.code != tc.code || !strings.HasSuffix(got.stdout, tc.says) {
				t.Errorf("code %d, %s\nwant code %d and at the end\n%s", got.code, got.stdout, tc.code, tc.says)
			}
			if diff := cmp.Diff(tc.asked, n.queries, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				t.Errorf("the agent was asked (-want +got):\n%s", diff)
			}
		})
	}
}

// A name of a service of the mesh is its virtual IP, as Consul tells it.
func TestExplainOfAServiceByItsName(t *testing.T) {
	for _, name := range []string{"api:8080", "api.virtual.consul:8080"} {
		n := explainNode()
		n.behind = &api.Behind{Service: "api", VirtualIPs: test.Addrs("240.0.0.7")}
		got := try(t, n, nil, "explain", "other", name)
		want := explain.Connection{Destination: netip.MustParseAddrPort("240.0.0.7:8080"), UID: explain.NoUID}
		if got.code != 0 || len(n.asked) != 1 || n.asked[0] != want || !strings.Contains(got.stdout, "Service: api\n") {
			t.Errorf("explain %s: %+v asked %+v, want %+v", name, got, n.asked, want)
		}
	}
}

// What an operator is told on a node whose allocation has no proxy, and the exit codes.
func TestExplainOnAKernel(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	environment := map[string]string{"WEIR_PIN_DIR": filepath.Join(test.BPFFS(t), "weir"), "WEIR_STATE_DIR": t.TempDir()}
	weir := func(args ...string) outcome {
		ui := cli.NewMockUi()
		code := weirTo(t.Context(), ui, environment, args...)
		return outcome{code: code, stdout: ui.OutputWriter.String(), stderr: ui.ErrorWriter.String()}
	}
	if got := weir("load"); got.code != 0 {
		t.Fatalf("load: %+v", got)
	}
	t.Cleanup(func() { weir("unload", "-force") })
	ns := test.NewNetNS(t)
	err := redirect.New(store.PathsFromEnv(func(name string) string { return environment[name] })).Add(redirect.Attachment{
		Key:   workload.AttachmentID{ContainerID: "0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01", IfName: "eth0"},
		NetNS: ns.Path,
		Request: workload.Request{
			Network: "nomad", Job: workload.Job{ID: "demo", Group: "web"}, Mode: workload.ModeTransparent,
			ProxyUID: 101, InboundPort: 20000, OutboundPort: 15001, ExcludeOutboundPorts: []uint16{5432},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		args string
		code int
		want string
	}{
		{"demo 203.0.113.7:80", 2, refusedText},
		{"0b5d 203.0.113.7:5432", 0, "> excluded_port   outbound port 5432 is excluded [job]\n\nVerdict: port_excluded (left alone: its port is excluded)\n"},
		{"-inbound demo 127.0.0.1:80", 2, "Verdict: refused_inbound_no_proxy ("},
		{"demo", 2, wholeText},
	} {
		got := weir(append([]string{"explain"}, strings.Fields(tc.args)...)...)
		if got.code != tc.code || !strings.Contains(got.stdout, tc.want) {
			t.Errorf("explain %s: code %d, %s\n%s\nwant code %d and\n%s", tc.args, got.code, got.stderr, got.stdout, tc.code, tc.want)
		}
		for line := range strings.Lines(got.stdout) {
			if len(strings.TrimRight(line, "\n")) > 80 {
				t.Errorf("explain %s: a line has more than 80 columns: %s", tc.args, line)
			}
		}
		var answer look.Explained
		asJSON := weir(append([]string{"explain", "-json"}, strings.Fields(tc.args)...)...)
		if err := json.Unmarshal([]byte(asJSON.stdout), &answer); err != nil || asJSON.code != tc.code || answer.Schema != 1 {
			t.Errorf("explain -json %s: code %d, %v: %s", tc.args, asJSON.code, err, asJSON.stdout)
		}
	}
}

const refusedText = `A connection of a task of demo/web/0b5d0c1e to 203.0.113.7:80

  rows            the rows of the workload are in force
  encoded_range   203.0.113.7 is not in the range that carries destinations to
                  the proxy
  dns             DNS is not sent to Consul
  proxy           the UID is not the proxy's, which is 101 [job]
  excluded_uid    no UID is excluded
  loopback        203.0.113.7 is not a loopback address
  own_address     203.0.113.7 is not an address of the allocation
  upstream        203.0.113.7 is no virtual IP of an explicit upstream
  excluded_port   outbound port 80 is not excluded
  excluded_cidr   203.0.113.7 is in no excluded CIDR
  mode            the allocation is in transparent mode: what no rule exempts is
                  redirected [job]
  broadcast       203.0.113.7 is neither multicast nor broadcast
  family          the proxy takes it by IPv4 [node]
  budget          the workload holds 0 destinations, of 65536 that it may
                  [default]
> listener        the proxy does not listen on its outbound port 15001 [node]

Verdict: refused_no_proxy (refused: the proxy has no outbound listener)
Behind it: nothing listens on 127.0.0.1:15001, so the connection is refused
  there.
Not looked at: what Consul says: no agent answers, and it is who asks Consul.
  Remedy: 'systemctl enable --now weir-agent', or run weir.nomad.hcl, Nomad's
  system job for it
Remedy: 'nomad alloc logs 0b5d0c1e connect-proxy-SERVICE' says why Envoy does
  not listen; 'weir events -f' names a listener that was not accepted
`

const wholeText = `demo/web/0b5d0c1e
  SETTING                  VALUE                             SOURCE
  mode                     transparent                       job
  proxy UID                101                               job
  outbound port            15001, the proxy does not listen  default
  inbound port             20000, the proxy does not listen  job
  guard                    off                               default
  excluded outbound ports  5432                              job
  destinations             0 of 65536                        default

A proxy does not listen: connections to it are refused.
Remedy: 'nomad alloc logs 0b5d0c1e connect-proxy-SERVICE' says why Envoy does
  not listen; 'weir events -f' names a listener that was not accepted
`
