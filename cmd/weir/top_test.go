// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/cli"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/cmd/weir/top"
	"github.com/weirmesh/weir/cmd/weir/traffic"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/program/runstats"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// busy is a node whose counters rise at each look.
func busy() *node {
	n := &node{}
	looks := uint64(0)
	counts := func(redirected, refused uint64) map[string]uint64 {
		return map[string]uint64{"redirected": 1000 + redirected*looks, "refused_no_proxy": refused * looks}
	}
	n.onVerdicts = func() {
		n.verdicts = []inspect.WorkloadVerdicts{
			{Key: workload.AttachmentID{ContainerID: "0b5d0c1e-7c0f", IfName: "eth0"}, ID: "0b5d0c1e-7c0f", Job: "shop", Group: "front", Cookie: 1, Counts: counts(1000, 0)},
			{Key: workload.AttachmentID{ContainerID: "1c6e1d2f-8d10", IfName: "eth0"}, ID: "1c6e1d2f-8d10", Job: "a-job-with-a-name-that-is-longer-than-a-terminal-is-wide", Group: "g", Cookie: 2, Counts: counts(10, 40)},
			{Key: workload.AttachmentID{ContainerID: "2d7f2e30-9e21", IfName: "eth0"}, ID: "2d7f2e30-9e21", Job: "idle", Cookie: 3, Counts: counts(0, 0)},
		}
		n.times = []runstats.RunTime{
			{Name: "weir_connect4", Programs: 1, Runs: 2000 * looks, Time: time.Duration(looks) * time.Millisecond},
			{Name: "weir_lookup", Programs: 3, Runs: 0},
		}
		n.traffic.Agent = api.Process{PID: 7, CPU: 10 + float64(looks)/100, Memory: 31 << 20}
		looks++
	}
	now := time.Now()
	shop := api.FlowSource{AllocID: "0b5d0c1e-7c0f", Job: "shop", TaskGroup: "front", Task: "server"}
	other := api.FlowSource{AllocID: "1c6e1d2f-8d10", Job: "batch", TaskGroup: "g"}
	edge := func(from api.FlowSource, to api.FlowDestination, verdict string, count uint64) api.CountedEdge {
		return api.CountedEdge{Count: count, Edge: api.Edge{
			Direction: api.DirectionOutbound, Source: from, Destination: to, Verdict: verdict, Refused: strings.HasPrefix(verdict, "refused"),
		}}
	}
	apiAlloc := api.FlowDestination{Service: "api", IP: netip.MustParseAddr("240.0.0.1"), Port: 80}
	far := api.FlowDestination{IP: netip.MustParseAddr("198.51.100.7"), Port: 443}
	n.traffic = &api.Traffic{Schema: 1, Since: now.Add(-10 * time.Second), Until: now, Edges: []api.CountedEdge{
		edge(shop, apiAlloc, "upstream", 300), edge(other, apiAlloc, "refused_no_proxy", 100), edge(other, far, "redirected", 20), edge(shop, far, "proxy", 5000),
	}}
	return n
}

// About 100 ms pass between two looks, and no test can know more exactly; the rates of
// one view have what passed in common.
func TestTop(t *testing.T) {
	n := busy()
	got := try(t, n, nil, "top", "-once", "-interval", "100ms")
	number := regexp.MustCompile(`\d+\.\d+([ /\n])`)
	lines := strings.Split(number.ReplaceAllString(got.stdout, "#$1"), "\n")
	for i, line := range lines {
		lines[i] = regexp.MustCompile(` {2,}`).ReplaceAllString(line, "  ")
	}
	want := `00:00:00, over # s
connections  #/s out, #/s in, #/s refused
agent  # % of a core, 31 MiB
programs  # % of a core

ID  JOB  OUT/S  IN/S  REFUSED/S  MOSTLY
0b5d0c1e  shop/front  #  #  #  redirected
1c6e1d2f  a-job…  #  #  #  refused_no_proxy
1 allocation without a connection

DESTINATION  CONNECTIONS/S  REFUSED/S  FROM
api:80  #  #  shop/server and 1 more
198.51.100.7:443  #  #  batch/g

PROGRAM  RUNS/S  EACH  OF A CORE
connect4  #  500 ns  # %
`
	cut := regexp.MustCompile(`a-job-with-a-name-[^ ]*…`) // where depends on the rates
	text := regexp.MustCompile(`^\d\d:\d\d:\d\d`).ReplaceAllString(cut.ReplaceAllString(strings.Join(lines, "\n"), "a-job…"), "00:00:00")
	if text != want || got.code != 0 || got.stderr != "" {
		t.Errorf("weir top -once = %d %q\n%s\nwant:\n%s", got.code, got.stderr, text, want)
	}
	for line := range strings.Lines(got.stdout) {
		if width := len([]rune(strings.TrimSuffix(line, "\n"))); width > 80 {
			t.Errorf("%q has %d columns", line, width)
		}
	}
	if coloured := tryOn(t, busy(), true, nil, "top", "-once", "-interval", "100ms"); !regexp.MustCompile(`\x1b\[31m\d+\.\d/s refused`).MatchString(coloured.stdout) {
		t.Errorf("refusals are not red: %q", coloured.stdout)
	}
}

// What is not known is said; the rest is shown.
func TestTopSaysWhatItDoesNotKnow(t *testing.T) {
	n := busy()
	n.noTimes = errors.New("operation not permitted")
	traffic := *n.traffic
	traffic.Problem, traffic.Edges, traffic.Lost = "flows are off", nil, 3
	n.traffic = &traffic
	got := try(t, n, nil, "top", "-once", "-interval", "100ms")
	for _, want := range []string{
		"\nthe kernel does not count how long programs run: operation not permitted\n",
		"\ndestinations are not known: flows are off\n",
		"\n3 connections are not among the destinations: more than the agent has room for\n",
		"\n0b5d0c1e  shop/front ",
	} {
		if !strings.Contains(got.stdout, want) {
			t.Errorf("no %q in:\n%s", want, got.stdout)
		}
	}
	if strings.Contains(got.stdout, "DESTINATION") || strings.Contains(got.stdout, "PROGRAM") {
		t.Errorf("it shows what it does not know:\n%s", got.stdout)
	}
	n = busy()
	n.onVerdicts, n.traffic = nil, nil
	got = try(t, n, nil, "top", "-once", "-interval", "100ms")
	if got.code != 0 || !strings.Contains(got.stdout, "\nno allocation is under Weir\n") || !strings.Contains(got.stdout, "\nno agent runs: destinations are not known\n") {
		t.Errorf("without an agent: %+v", got)
	}
}

// It goes on until it is interrupted, which is no error, and on a terminal each view
// takes the place of the one before.
func TestTopGoesOn(t *testing.T) {
	n := busy()
	counters, looks := n.onVerdicts, 0
	ctx, stop := context.WithCancel(t.Context())
	n.onVerdicts = func() {
		counters()
		if looks++; looks == 4 {
			stop()
		}
	}
	ui := cli.NewMockUi()
	code := run([]string{"top", "-interval", "100ms"}, base.Env{
		Ctx: ctx, UI: ui, Getenv: func(string) string { return "" }, Terminal: true, Open: func(store.Paths) base.Datapath { return n },
		AskTraffic: func(context.Context, string, time.Time) (api.Traffic, error) { return *n.traffic, nil }, Clear: func() { n.cleared++ },
	})
	if code != 0 || n.cleared != 3 || strings.Count(ui.OutputWriter.String(), "REFUSED/S  MOSTLY") != 3 {
		t.Errorf("code %d, %d views cleared, %s", code, n.cleared, ui.OutputWriter.String())
	}
}

func TestTopRefuses(t *testing.T) {
	for args, why := range map[string]string{
		"-interval 1ms": "read -interval: 1ms is less than 100ms",
		"-n 0":          "read -n: 0: want 1 or more",
	} {
		want(t, try(t, busy(), nil, append([]string{"top"}, strings.Fields(args)...)...), outcome{code: 1, stderr: "weir top: " + why + "\n"})
	}
}

// topOnAKernel counts dials that nobody takes while they happen.
func topOnAKernel(t *testing.T, weir func(context.Context, ...string) (int, *cli.MockUi), ns *test.NetNS) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			_, _ = test.Ask(ns, "tcp4", "192.0.2.1:8080")
		}
	}()
	code, ui := weir(t.Context(), "top", "-once", "-json", "-interval", "300ms")
	stop()
	<-ended
	var report top.Report
	if err := json.Unmarshal(ui.OutputWriter.Bytes(), &report); err != nil || code != 0 {
		t.Fatalf("weir top = %d, %v: %s", code, err, ui.ErrorWriter.String())
	}
	if len(report.Allocations) != 1 || report.Allocations[0].Job != "demo" || report.Allocations[0].Refused <= 0 || report.Total.Refused != report.Allocations[0].Refused {
		t.Errorf("allocations = %+v, total %+v: want demo's refusals", report.Allocations, report.Total)
	}
	ran := false
	for _, p := range report.Programs {
		ran = ran || p.Name == "weir_connect4" && p.Runs > 0 && p.Each > 0 && p.Cores > 0 && p.Cores < 1
	}
	if !ran {
		t.Errorf("programs = %+v: want runs of connect4", report.Programs)
	}
}

func TestMostly(t *testing.T) {
	for want, rates := range map[string]map[string]float64{
		"redirected":       {"redirected": 3, "proxy": 3.1, "local": 1},
		"refused_no_proxy": {"redirected": 3, "proxy": 3.1, "refused_no_proxy": 0.1},
		"proxy":            {"proxy": 3.1},
	} {
		if got := traffic.Mostly(top.Allocation{Verdicts: rates}); got != want {
			t.Errorf("mostly of %v = %q, want %q", rates, got, want)
		}
	}
}
