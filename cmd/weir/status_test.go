// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

func healthy() inspect.Status {
	return inspect.Status{
		Loaded: true, Current: true, Workloads: 2,
		Paths:      store.Paths{PinDir: "/sys/fs/bpf/weir", StateDir: "/run/weir"},
		CgroupRoot: "/sys/fs/cgroup",
		Barrier:    bpfmap.BarrierKernel,
		Links:      []string{"weir_connect4", "weir_connect6"},
		Maps: []bpfmap.MapInfo{
			{Name: "origins", Counted: true, Rows: 512, MaxEntries: 1048576, Bytes: 8392704},
			{Name: "workloads", MaxEntries: 16384, Bytes: 131329},
		},
	}
}

// Without -verbose there is nothing of the mechanics, however many maps there are.
func TestStatusFitsOneScreen(t *testing.T) {
	n := &node{status: healthy()}
	n.status.Others = []inspect.Other{{ID: 17, Name: "cil_sock4_connect"}, {ID: 18, Name: "cil_sock6_connect"}}
	want(t, try(t, n, nil, "status"), outcome{stdout: `healthy: 2 workloads; no agent runs, so plain connect jobs are not guarded

2 programs of others on the same hooks: -verbose lists them

agent: none runs, so nothing follows Consul, only allocations with
  transparent_proxy are under Weir, and what they dial before their proxy
  listens is refused
  next: 'systemctl enable --now weir-agent', or run weir.nomad.hcl, Nomad's
  system job for it
`})
}

func TestStatusVerbose(t *testing.T) {
	want(t, try(t, &node{status: healthy()}, nil, "status", "-verbose"), outcome{stdout: `healthy: 2 workloads; no agent runs, so plain connect jobs are not guarded

pins         /sys/fs/bpf/weir
records      /run/weir
attached to  /sys/fs/cgroup
programs     connect4 connect6
changes      wait for running programs by membarrier

MAP        ROWS  MOST ENTRIES  MEMORY
origins    512   1048576       8196 KiB
workloads  -     16384         129 KiB

agent: none runs, so nothing follows Consul, only allocations with
  transparent_proxy are under Weir, and what they dial before their proxy
  listens is refused
  next: 'systemctl enable --now weir-agent', or run weir.nomad.hcl, Nomad's
  system job for it
`})
}

func TestStatusNotLoaded(t *testing.T) {
	status := inspect.Status{Problems: []health.Problem{
		health.NewProblem(health.ProblemNotLoaded, "run 'weir load'", "the data path is not loaded: no workload is redirected"),
	}}
	want(t, try(t, &node{status: status}, nil, "status"), outcome{code: 1, stdout: `not healthy: 1 problem; no agent answers, so plain connect jobs are not guarded
  the data path is not loaded: no workload is redirected [not-loaded]
    remedy: run 'weir load'

agent: none runs, so nothing follows Consul, only allocations with
  transparent_proxy are under Weir, and what they dial before their proxy
  listens is refused
  next: 'systemctl enable --now weir-agent', or run weir.nomad.hcl, Nomad's
  system job for it
`})
}

func TestStatusWithProblems(t *testing.T) {
	status := healthy()
	status.Problems = []health.Problem{
		health.NewProblem(health.ProblemProgramDetached, "run 'weir load'", "link connect4 is gone"),
		health.NewProblem(health.ProblemNamespaceGone, "run CNI DEL or GC; nothing of it is in use", "its namespace is gone").Of("workload 0b5d0c1e-eth0", "0b5d0c1e"),
	}
	want(t, try(t, &node{status: status}, nil, "status"), outcome{code: 1, stdout: `not healthy: 2 problems; no agent answers, so plain connect jobs are not guarded
  link connect4 is gone [program-detached]
    remedy: run 'weir load'
  workload 0b5d0c1e-eth0: its namespace is gone [namespace-gone]
    remedy: run CNI DEL or GC; nothing of it is in use

agent: none runs, so nothing follows Consul, only allocations with
  transparent_proxy are under Weir, and what they dial before their proxy
  listens is refused
  next: 'systemctl enable --now weir-agent', or run weir.nomad.hcl, Nomad's
  system job for it
`})
}

// Lines fit a terminal of 80 columns, in colour and without.
func TestStatusAndWorkloadsFitATerminal(t *testing.T) {
	long := health.NewProblem(health.ProblemProxyNotListening, "see the log of the proxy's task ('nomad alloc logs'): whether Envoy runs, and gets its configuration from Consul",
		"its proxy does not listen on ports 15001 and 20005: nothing does").Of("allocation 0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01 (demo/web)", "0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01")
	status := healthy()
	status.Problems, status.Links = []health.Problem{long}, program.ProgramNames()
	n := &node{status: status, list: []inspect.WorkloadStatus{{
		Key: workload.AttachmentID{ContainerID: "0b5d0c1e", IfName: "eth0"}, ID: "0b5d0c1e", Mode: workload.ModeDirect, Guard: workload.GuardAudit,
		Problems: []health.Problem{long}, Notes: []string{strings.Repeat("a note that says much ", 9)},
	}}, agent: &api.Status{
		Consul:    api.ConsulStatus{Enabled: true, Address: "127.0.0.1:8500", Error: strings.Repeat("no answer since long ", 9)},
		Docker:    strings.Repeat("no answer since long ", 9),
		Workloads: []api.WorkloadView{{State: api.StateHost}, {State: api.StateConsul}, {State: api.StateUnclaimed}, {State: api.StateUnprotected}},
	}}
	for _, command := range []string{"status", "status -verbose", "workloads"} {
		plain := try(t, n, nil, strings.Fields(command)...).stdout
		for line := range strings.Lines(plain) {
			if width := utf8.RuneCountInString(strings.TrimRight(line, "\n")); width > base.Columns {
				t.Errorf("weir %s: a line of %d columns: %s", command, width, line)
			}
		}
		coloured := tryOn(t, n, true, nil, strings.Fields(command)...).stdout
		if got := regexp.MustCompile("\x1b\\[[0-9]*m").ReplaceAllString(coloured, ""); got != plain {
			t.Errorf("weir %s in colour is\n%s\nand without\n%s", command, got, plain)
		}
		if coloured == plain || tryOn(t, n, true, map[string]string{"NO_COLOR": "1"}, strings.Fields(command)...).stdout != plain {
			t.Errorf("weir %s: %q; want colour on a terminal, and none with NO_COLOR", command, coloured)
		}
	}
}

func TestStatusJSON(t *testing.T) {
	status := inspect.Status{Links: []string{}, Maps: []bpfmap.MapInfo{}, Problems: []health.Problem{
		health.NewProblem(health.ProblemTableFull, "r", "w").Of("workload 0b5d0c1e-eth0", "0b5d0c1e"),
	}}
	want(t, try(t, &node{status: status}, nil, "status", "-json"), outcome{code: 1, stdout: `{
  "schema": 1,
  "loaded": false,
  "current": false,
  "paths": {
    "pin_dir": "",
    "state_dir": "",
    "cgroup_root": ""
  },
  "cgroup_root": "",
  "links": [],
  "maps": [],
  "barrier": "",
  "workloads": 0,
  "problems": [
    {
      "code": "table-full",
      "severity": "warning",
      "subject": "workload 0b5d0c1e-eth0",
      "alloc_id": "0b5d0c1e",
      "what": "w",
      "remedy": "r"
    }
  ],
  "agent": null
}
`})
}

// What the agent knows to be wrong makes a node unhealthy as the data path does,
// and is in JSON as well.
func TestStatusOfTheAgentsProblems(t *testing.T) {
	view := &api.Status{
		Consul: api.ConsulStatus{Enabled: true, Address: "127.0.0.1:8500", Error: "refused"},
		Problems: []health.Problem{
			{What: "not in sync with Consul: refused", Remedy: "start Consul"},
			{What: "link connect4 is gone", Remedy: "see the agent's log"},
		},
		Workloads: []api.WorkloadView{{State: api.StateHost}, {State: api.StateManaged}, {State: api.StateManaged}},
	}
	status := healthy()
	status.Problems = []health.Problem{{What: "link connect4 is gone", Remedy: "run 'weir load'"}}
	n := &node{status: status, agent: view}
	got := try(t, n, nil, "status")
	if want := `not healthy: 2 problems
  link connect4 is gone
    remedy: run 'weir load'
  not in sync with Consul: refused
    remedy: start Consul
`; got.code != 1 || !strings.HasPrefix(got.stdout, want) {
		t.Errorf("outcome %d:\n%s\nwant 1, beginning with:\n%s", got.code, got.stdout, want)
	}
	var told struct {
		Problems []health.Problem
		Agent    *struct {
			Consul    api.ConsulStatus
			Workloads map[string]int
		}
	}
	got = try(t, n, nil, "status", "-json")
	if err := json.Unmarshal([]byte(got.stdout), &told); err != nil {
		t.Fatal(err)
	}
	if got.code != 1 || len(told.Problems) != 2 || told.Problems[1] != view.Problems[0] {
		t.Errorf("JSON %d, problems %q; want 1 and both", got.code, told.Problems)
	}
	if told.Agent == nil || told.Agent.Consul.Error != "refused" || told.Agent.Workloads["managed"] != 2 || told.Agent.Workloads["host"] != 1 {
		t.Errorf("JSON has the agent as %+v, want its view of Consul and 3 allocations by their states", told.Agent)
	}
	view.Problems = nil
	if got := try(t, &node{status: healthy(), agent: view}, nil, "status"); got.code != 0 || !strings.HasPrefix(got.stdout, "healthy: ") {
		t.Errorf("outcome of a node without problems = %+v, want 0", got)
	}
}

// An agent that should answer and does not is wrong; none at all is not.
func TestStatusWithoutAnAgent(t *testing.T) {
	refused := fmt.Errorf("ask agent: %w: %w", api.ErrNotRunning, syscall.ECONNREFUSED)
	own := map[string]string{"WEIR_STATE_DIR": "/elsewhere"}
	for _, c := range []struct {
		name        string
		node        node
		environment map[string]string
		want        string // what is wrong; empty: nothing
	}{
		{"none was ever started", node{}, nil, ""},
		{"a socket that nobody listens on", node{silence: refused}, nil, "the agent does not run"},
		{"the same of an instance of its own", node{silence: refused}, own, "the agent does not run"},
		{"a socket on which nobody answers", node{silence: context.DeadlineExceeded}, nil, "the agent does not answer: context deadline exceeded"},
		{"systemd was to run it", node{unit: true}, nil, "the agent does not run"},
		{"systemd runs another instance", node{unit: true}, own, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.node.status = healthy()
			got, asJSON := try(t, &c.node, c.environment, "status"), try(t, &c.node, c.environment, "status", "-json")
			if c.want == "" {
				if got.code != 0 || asJSON.code != 0 || !strings.HasPrefix(got.stdout, "healthy: 2 workloads; no agent runs, so plain connect jobs are not guarded\n") ||
					!strings.Contains(got.stdout, "next: 'systemctl enable --now weir-agent'") {
					t.Errorf("codes %d and %d, output:\n%s\nwant 0, a first line that tells of the agent, and the next step", got.code, asJSON.code, got.stdout)
				}
				return
			}
			if got.code != 1 || asJSON.code != 1 || !strings.Contains(got.stdout, c.want) || !strings.Contains(asJSON.stdout, c.want) ||
				!strings.Contains(got.stdout, "systemctl restart weir-agent") {
				t.Errorf("codes %d and %d, output:\n%s\n%s\nwant 1, %q and what to do", got.code, asJSON.code, got.stdout, asJSON.stdout, c.want)
			}
			if got := try(t, &c.node, c.environment, "workloads"); got.code != 0 || !strings.Contains(got.stdout, c.want) {
				t.Errorf("weir workloads = %+v, want it told", got)
			}
		})
	}
}

func TestStatusUnknown(t *testing.T) {
	want(t, try(t, &node{err: errors.New("take lock /run/weir/lock: permission denied")}, nil, "status"), outcome{
		code: 1, stderr: "weir status: take lock /run/weir/lock: permission denied\n",
	})
}

// Colour is for a terminal, and for those who did not say no.
func TestColour(t *testing.T) {
	for _, c := range []struct {
		terminal    bool
		environment map[string]string
		args        []string
		colour      bool
	}{
		{terminal: true, colour: true},
		{terminal: false},
		{terminal: true, environment: map[string]string{"NO_COLOR": "1"}},
		{terminal: true, environment: map[string]string{"TERM": "dumb"}},
		{terminal: true, args: []string{"-json"}},
	} {
		n := &node{status: healthy()}
		got := tryOn(t, n, c.terminal, c.environment, append([]string{"status"}, c.args...)...)
		if colour := strings.Contains(got.stdout, "\x1b["); colour != c.colour {
			t.Errorf("%+v: colour = %t", c, colour)
		}
	}
}

// Programs of others on the hooks are told, and are no problem by themselves.
func TestStatusNamesProgramsOfOthers(t *testing.T) {
	n := &node{status: inspect.Status{Loaded: true, Problems: []health.Problem{}, Others: []inspect.Other{
		{ID: 17, Name: "cil_sock4_connect", Hook: "CGroupInet4Connect", Order: "before", Effect: "may refuse", Pinned: "/sys/fs/bpf/cilium/c4"},
		{ID: 18, Name: "weir_connect4", Hook: "CGroupInet4Connect", Order: "after", Effect: "serves namespaces of its own", Weir: true, Owner: "process 4 (weir)"},
	}}}
	got := try(t, n, nil, "status", "-verbose")
	for _, want := range []string{"cil_sock4_connect", "17", "before", "/sys/fs/bpf/cilium/c4", "weir_connect4 (another Weir)", "after", "process 4 (weir)"} {
		if !strings.Contains(got.stdout, want) {
			t.Errorf("status does not say %q:\n%s", want, got.stdout)
		}
	}
	if got.code != 0 {
		t.Errorf("exit %d, want 0", got.code)
	}
}

// Allocations whose connections wait are named, with how long they do: some of many.
func TestStatusNamesWhoWaits(t *testing.T) {
	view := &api.Status{Consul: api.ConsulStatus{Enabled: true, InSync: true}}
	for i := range 5 {
		view.Workloads = append(view.Workloads, api.WorkloadView{
			Key: workload.AttachmentID{ContainerID: fmt.Sprint(i, "b5d0c1e"), IfName: "eth0"}, Job: fmt.Sprint("demo", i), Group: "web",
			State: api.StateManaged, HeldSince: time.Now().Add(-4 * time.Second),
		})
	}
	got := try(t, &node{status: healthy(), agent: view}, nil, "status")
	const wanted = "\nagent: demo0/web/0b5d0c1e waits for its proxy since 4s, and so does what it\n  dials\n"
	if got.code != 0 || !strings.Contains(got.stdout, wanted) || !strings.Contains(got.stdout, "agent: 2 allocations more wait for their proxies") {
		t.Errorf("outcome %d:\n%s\nwant 0, with %q and that 2 more wait", got.code, got.stdout, wanted)
	}
	for i := range view.Workloads {
		view.Workloads[i].HeldSince = time.Time{}
	}
	if got := try(t, &node{status: healthy(), agent: view}, nil, "status"); strings.Contains(got.stdout, "wait") {
		t.Errorf("output of a node where nothing waits:\n%s", got.stdout)
	}
}
