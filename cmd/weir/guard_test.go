// SPDX-License-Identifier: MPL-2.0

package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

func audited() *node {
	now := time.Now()
	n := &node{guard: &api.GuardList{Schema: 1, Since: now.Add(-3 * time.Hour), Entries: []api.GuardEntry{
		{
			AllocID: "0b5d0c1e-7c0f", Job: "demo", TaskGroup: "web", Protocol: "tcp", Port: 9102, Source: "prometheus/scrape/77aa01bb", Verdict: "guard_audit",
			Count: 12, First: now.Add(-2 * time.Hour), Last: now.Add(-90 * time.Second), Remedy: `network { port "port-9102" { to = 9102 } }`,
		},
		{
			AllocID: "0b5d0c1e-7c0f", Job: "demo", TaskGroup: "web", Protocol: "tcp", Port: 9102, Source: "10.0.0.9", Verdict: "refused_guard",
			Count: 1, First: now.Add(-50 * time.Hour), Last: now.Add(-50 * time.Hour), Remedy: `network { port "port-9102" { to = 9102 } }`,
		},
		{
			AllocID: "1c6e1d2f-8d1a", Job: "shop", TaskGroup: "api", Port: 53, Source: "2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff", Verdict: "guard_audit",
			Count: 100000, First: now, Last: now, Remedy: `transparent_proxy { exclude_inbound_ports = ["53"] }`,
		},
	}}}
	for _, e := range n.guard.Entries[1:] {
		n.known = append(n.known, inspect.Record{Key: workload.AttachmentID{ContainerID: e.AllocID}, Request: workload.Request{Job: workload.Job{ID: e.Job}}})
	}
	n.known = append(n.known, inspect.Record{Key: workload.AttachmentID{ContainerID: "c0ffee"}, Request: workload.Request{Job: workload.Job{ID: "quiet"}}})
	return n
}

func TestGuard(t *testing.T) {
	n := audited()
	want(t, try(t, n, nil, "guard"), outcome{stdout: `ALLOC     JOB   PROTO  PORT  SOURCE                          COUNT   FIRST  LAST
0b5d0c1e  demo  tcp    9102  prometheus/scrape/77aa01bb      12      2h     1m
0b5d0c1e  demo  tcp    9102  10.0.0.9                        1       2d     2d
1c6e1d2f  shop  -      53    2001:db8:aaaa:bbbb:cccc:dddd:…  100000  0s     0s

To let it in, in the job's group:
  demo/web: network { port "port-9102" { to = 9102 } }
  shop/api: transparent_proxy { exclude_inbound_ports = ["53"] }

all of it since the agent began to record, 3h ago; FIRST and LAST are ages
`})
	n.guard.Omitted, n.guard.Lost = 5, 7
	want(t, try(t, n, nil, "guard", "quiet"), outcome{stdout: `nothing came in past a proxy since the agent began to record, 3h ago
not listed: 5 that came to allocations which have 256 entries, or to a full table
perhaps not listed: 7 connections of any kind that the kernel could not tell of
`})
	got := tryOn(t, n, true, nil, "guard", "0b")
	if !strings.Contains(got.stdout, "\x1b[31m0b5d0c1e  demo  tcp    9102  10.0.0.9 ") || strings.Contains(got.stdout, "shop") {
		t.Errorf("weir guard 0b: %+v, want one allocation, and what was refused in red", got)
	}
}

func TestGuardJSON(t *testing.T) {
	var list struct {
		Schema  int
		Entries []map[string]any
	}
	got := try(t, audited(), nil, "guard", "-json", "shop")
	if err := json.Unmarshal([]byte(got.stdout), &list); err != nil || list.Schema != 1 || len(list.Entries) != 1 {
		t.Fatalf("weir guard -json shop: %+v, %v, want one entry", got, err)
	}
	for _, key := range []string{"alloc_id", "job", "protocol", "port", "source", "count", "first", "last", "remedy"} {
		if _, ok := list.Entries[0][key]; !ok {
			t.Errorf("an entry has no %q: %v", key, list.Entries[0])
		}
	}
	if got := try(t, audited(), nil, "guard", "-json", "quiet"); !strings.Contains(got.stdout, `"entries": []`) {
		t.Errorf("weir guard -json quiet: %+v, want an empty list", got)
	}
}

func TestGuardWithoutAnAgent(t *testing.T) {
	want(t, try(t, &node{}, nil, "guard"), outcome{code: 1, stderr: "weir guard: the agent does not run: it keeps the list; " +
		"next: 'systemctl enable --now weir-agent', or run weir.nomad.hcl, Nomad's system job for it\n"})
	n := &node{silence: fmt.Errorf("ask: %w", api.ErrFlowsOff)}
	if got := try(t, n, nil, "guard"); got.code != 1 || !strings.Contains(got.stderr, "flows { enabled = false }") {
		t.Errorf("weir guard: %+v, want it told what to change", got)
	}
}
