// SPDX-License-Identifier: MPL-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/traffic"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/monitor"
	"github.com/weirmesh/weir/redirect/workload"
)

// agentEvents is what an agent would tell that reads the kernel's ring.
func (n *node) agentEvents(deliver func(monitor.Event) error) error {
	if !n.recording {
		return fmt.Errorf("%w: %w", api.ErrNotRunning, fs.ErrNotExist)
	}
	for _, event := range n.told {
		if err := deliver(event); err != nil {
			return err
		}
	}
	return nil
}

func (n *node) agentFlows(query api.FlowQuery, deliver func(api.Flow) error) error {
	n.query = query
	if !n.recording {
		return fmt.Errorf("%w: %w", api.ErrNotRunning, fs.ErrNotExist)
	}
	for _, flow := range n.flows {
		if err := deliver(flow); err != nil {
			return err
		}
	}
	return n.err
}

func fourFlows() *node {
	at := time.Date(2026, 11, 23, 12, 30, 0, 0, time.Local)
	uid := uint32(1000)
	n := twoWorkloads()
	shop := api.FlowSource{
		AllocID: "0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01", Namespace: "prod", Job: "shop", TaskGroup: "front", Task: "server", PID: 815, UID: &uid,
		Command: "curl", Service: "web",
	}
	apiAlloc := api.FlowDestination{Service: "api", IP: netip.MustParseAddr("240.0.0.1"), Port: 80}
	outside := api.FlowSource{IP: netip.MustParseAddr("2001:db8::1234:5678:9abc:def0"), Port: 40000}
	n.recording = true
	n.flows = []api.Flow{
		{Schema: 1, Time: at, Node: "n1", Direction: api.DirectionOutbound, Verdict: "upstream", Source: shop, Destination: apiAlloc},
		{Schema: 1, Time: at, Node: "n1", Verdict: "lost", Lost: 7, Cause: api.LostByReader},
		{
			Schema: 1, Time: at.Add(time.Second), Node: "n1", Direction: api.DirectionInbound, Verdict: "refused_inbound_no_proxy", Refused: true,
			Source: outside, Destination: api.FlowDestination{AllocID: shop.AllocID, IP: netip.MustParseAddr("2001:db8::ffff:ffff:ffff:1"), Port: 8080},
		},
		{Schema: 1, Time: at.Add(2 * time.Second), Node: "n1", Direction: api.DirectionOutbound, Verdict: "upstream", Source: shop, Destination: apiAlloc},
	}
	n.flows[3].Source.PID = 816
	return n
}

const flowHeading = "TIME      SOURCE                DESTINATION             VERDICT\n"

func TestFlows(t *testing.T) {
	n := fourFlows()
	got := try(t, n, nil, "flows")
	want(t, got, outcome{stdout: flowHeading +
		"12:30:00  shop/server           api:80                  upstream\n" +
		"12:30:00  lost: 7: what reads them is slower than connections happen\n" +
		"12:30:01  2001:db8::1234:5678…  0b5d0c1e:8080           refused_inbound_no_proxy\n" +
		"12:30:02  shop/server           api:80                  upstream\n"})
	for line := range strings.Lines(got.stdout) {
		if width := len([]rune(strings.TrimSuffix(line, "\n"))); width > 80 {
			t.Errorf("%q has %d columns", line, width)
		}
	}
	if n.query.Last != traffic.FewFlows || n.query.Follow {
		t.Errorf("the agent is asked for %+v, want the last %d", n.query, traffic.FewFlows)
	}
	n.flows = slices.Delete(n.flows, 1, 2)
	want(t, try(t, n, nil, "flows", "-numeric"), outcome{stdout: flowHeading +
		"12:30:00  0b5d0c1e/815          240.0.0.1:80            upstream\n" +
		"12:30:01  2001:db8::1234:5678…  [2001:db8::ffff:…:8080  refused_inbound_no_proxy\n" +
		"12:30:02  0b5d0c1e/816          240.0.0.1:80            upstream\n"})
	if coloured := tryOn(t, n, true, nil, "flows"); !strings.Contains(coloured.stdout, "\x1b[31m12:30:01") {
		t.Errorf("a refusal is not red: %q", coloured.stdout)
	}
}

func TestFlowsJSON(t *testing.T) {
	n := fourFlows()
	n.flows = n.flows[:1]
	n.flows[0].Time = time.Date(2026, 11, 23, 12, 30, 0, 0, time.UTC)
	want(t, try(t, n, nil, "flows", "-json"), outcome{stdout: `{"schema":1,"time":"2026-11-23T12:30:00Z","node":"n1","direction":"outbound",` +
		`"verdict":"upstream","refused":false,"source":{"alloc_id":"0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01","namespace":"prod","job":"shop",` +
		`"task_group":"front","task":"server","pid":815,"uid":1000,"command":"curl","service":"web"},` +
		`"destination":{"service":"api","ip":"240.0.0.1","port":80}}` + "\n"})
}

// Who talks to what does not tell one process of a task from the next.
// A flow as a dictionary has all keys of its JSON, each in full.
func TestFlowsOutput(t *testing.T) {
	n := fourFlows()
	n.flows = n.flows[1:3]
	for i := range n.flows {
		n.flows[i].Time = time.Date(2026, 11, 23, 12, 30, i, 0, time.UTC)
	}
	want(t, try(t, n, nil, "flows", "-o", "dict"), outcome{stdout: `                  time: 2026-11-23T12:30:00Z
                  node: n1
               verdict: lost
               refused: false
                  lost: 7
                 cause: reader

                  time: 2026-11-23T12:30:01Z
                  node: n1
             direction: inbound
               verdict: refused_inbound_no_proxy
               refused: true
             source.ip: 2001:db8::1234:5678:9abc:def0
           source.port: 40000
  destination.alloc_id: 0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01
        destination.ip: 2001:db8::ffff:ffff:ffff:1
      destination.port: 8080

`})
	for _, same := range [][2]string{{"-o json", "-json"}, {"-o table", ""}, {"-o json -summary", "-json -summary"}} {
		got := try(t, n, nil, append([]string{"flows"}, strings.Fields(same[0])...)...)
		want(t, got, try(t, n, nil, append([]string{"flows"}, strings.Fields(same[1])...)...))
	}
	for args, why := range map[string]string{
		"-o yaml": `read -o: "yaml" is none of table, dict and json`, "-o dict -json": "-json beside -o dict: give one of them",
		"-o dict -summary": "-summary is a table or JSON, and no -o dict",
	} {
		want(t, try(t, n, nil, append([]string{"flows"}, strings.Fields(args)...)...), outcome{code: 1, stderr: "weir flows: " + why + "\n"})
	}
}

func TestFlowsSummary(t *testing.T) {
	n := fourFlows()
	want(t, try(t, n, nil, "flows", "-summary"), outcome{stdout: "" +
		"COUNT     SOURCE                DESTINATION             VERDICT\n" +
		"2         shop/server           api:80                  upstream\n" +
		"1         2001:db8::1234:5678…  0b5d0c1e:8080           refused_inbound_no_proxy\n" +
		"7         lost: these connections are not among those above\n"})
	if n.query.Last != 0 {
		t.Errorf("the agent is asked for %+v, want all", n.query)
	}
	var summary traffic.FlowSummary
	if err := json.Unmarshal([]byte(try(t, n, nil, "flows", "-summary", "-json").stdout), &summary); err != nil {
		t.Fatal(err)
	}
	if len(summary.Edges) != 2 || summary.Schema != 1 || summary.Lost != 7 || summary.Edges[0].Count != 2 || summary.Edges[0].Source.Task != "server" {
		t.Errorf("summary = %+v", summary)
	}
}

func TestFlowsAsksWhatItIsTold(t *testing.T) {
	n := fourFlows()
	before := time.Now()
	got := try(t, n, nil, "flows", "-f", "-last", "5", "-since", "10m", "-until", "2026-11-28T00:00:00Z", "-from", "shop", "-to", "10.0.0.0/8", "-job", "j",
		"-alloc", "0b5d", "-task", "t", "-service", "s", "-port", "80", "-verdict", "upstream,redirected", "-refused", "-not")
	if got.code != 0 {
		t.Fatalf("%+v", got)
	}
	if ago := before.Sub(n.query.Since); ago > 10*time.Minute || ago < 9*time.Minute {
		t.Errorf("since %s ago, want 10m", ago)
	}
	n.query.Since = time.Time{}
	asked := api.FlowQuery{
		Follow: true, Last: 5, Until: time.Date(2026, 11, 28, 0, 0, 0, 0, time.UTC), From: "shop", To: "10.0.0.0/8", Alloc: "0b5d", Job: "j",
		Task: "t", Service: "s", Port: 80, Verdicts: []string{"upstream", "redirected"}, Refused: true, Not: true,
	}
	if diff := cmp.Diff(asked, n.query); diff != "" {
		t.Errorf("query (-want +got):\n%s", diff)
	}
	n.known = []inspect.Record{{Key: workload.AttachmentID{ContainerID: "0b5d0c1e"}, Request: workload.Request{Job: workload.Job{AllocID: "0b5d0c1e", ID: "demo"}}}}
	try(t, n, nil, "flows", "demo")
	if n.query.Job != "demo" {
		t.Errorf("query = %+v, want job demo", n.query)
	}
	try(t, n, nil, "flows", "0b5")
	if n.query.Alloc != "0b5d0c1e" {
		t.Errorf("query = %+v, want allocation 0b5d0c1e", n.query)
	}
	for args, why := range map[string]string{
		"-since yesterday": `read -since: "yesterday": want a duration (10m) or a time (2006-01-02T15:04:05Z)`,
		"-port 70000":      "read -port: 70000 is no port",
		"-last -1":         "read -last: -1 is no count",
		"-summary -f":      "-summary is of what was recorded, and -f of what is to come: give one of them",
		"demo -job j":      `"demo" beside -alloc or -job: give one of them`,
	} {
		want(t, try(t, n, nil, append([]string{"flows"}, strings.Fields(args)...)...), outcome{code: 1, stderr: "weir flows: " + why + "\n"})
	}
	n.recording = false
	got = try(t, n, nil, "flows")
	if got.code != 1 || !strings.Contains(got.stderr, "the agent does not run") || !strings.Contains(got.stderr, "weir events -f") {
		t.Errorf("without an agent: %+v", got)
	}
}
