// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/cli"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/cmd/weir/maintain"
	"github.com/weirmesh/weir/cni"
	"github.com/weirmesh/weir/cni/ended"
	"github.com/weirmesh/weir/redirect/dump"
	"github.com/weirmesh/weir/redirect/explain"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/loader"
	"github.com/weirmesh/weir/redirect/monitor"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/program/runstats"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// node is a data path that answers what a test gives it.
type node struct {
	paths    store.Paths
	load     loader.Result
	removed  []program.Removal
	status   inspect.Status
	list     []inspect.WorkloadStatus
	known    []inspect.Record
	verdicts []inspect.WorkloadVerdicts
	events   []monitor.Event
	onEvents func() // what happens once they are read

	onVerdicts func()      // what happens before they are counted
	agent      *api.Status // nil: none runs
	guard      *api.GuardList
	behind     *api.Behind // what Consul says; nil: no agent answers
	queries    []api.BehindQuery
	silence    error  // why none answers; nil: it has no socket
	unit       bool   // systemd is to run one
	uid        int    // who runs the program
	program    string // the CLI's file
	networks   []cni.Attached
	bridges    []string // that are removed with the networks
	others     []string // ... and that are not
	ready      []health.Check
	proc       string // where processes are
	err        error

	recording   bool            // the agent does
	told        []monitor.Event // ... of the kernel's
	flows       []api.Flow
	query       api.FlowQuery // of the last reader of them
	explanation explain.Explanation
	asked       []explain.Connection // of explain
	settings    []explain.Setting
	rows        []dump.Row
	silent      bool // a proxy does not listen
	traffic     *api.Traffic
	changes     *api.ChangeList
	since       time.Time // that the last list of them was asked from
	noTimes     error     // why the kernel does not count the time of programs
	times       []runstats.RunTime
	cleared     int    // how often the terminal was
	log         string // of the agent
	noLog       error  // why there is none

	left      []ended.Attachment              // of ended allocations
	stuck     map[workload.AttachmentID]error // why one of them cannot be removed
	collected []workload.AttachmentID         // that were removed
	lookedAt  ended.Node

	lookedFor [][]workload.AttachmentID // of each look at workloads, the keys
	named     bool                      // who holds the programs of others was asked for
}

func (n *node) Load() (loader.Result, error)       { return n.load, n.err }
func (n *node) Unload() ([]program.Removal, error) { return n.removed, n.err }
func (n *node) Status() (inspect.Status, error)    { return n.status, n.err }
func (n *node) Readiness() []health.Check          { return n.ready }
func (n *node) Records() ([]inspect.Record, error) {
	known := slices.Clone(n.known)
	if n.known == nil {
		for _, w := range n.list { // what is looked at has a record
			r := inspect.Record{Key: w.Key}
			r.Request.Job.AllocID, r.Request.Job.ID, r.Request.Job.Group = w.ID, w.Job, w.Group
			known = append(known, r)
		}
	}
	return known, n.err
}
func (n *node) Workloads(keys ...workload.AttachmentID) ([]inspect.WorkloadStatus, error) {
	n.lookedFor = append(n.lookedFor, keys)
	list := slices.Clone(n.list)
	if len(keys) > 0 {
		list = slices.DeleteFunc(list, func(w inspect.WorkloadStatus) bool { return !slices.Contains(keys, w.Key) })
	}
	return list, n.err
}
func (n *node) NameOthers([]inspect.Other) { n.named = true }
func (n *node) Verdicts() ([]inspect.WorkloadVerdicts, error) {
	if n.onVerdicts != nil {
		n.onVerdicts()
	}
	return n.verdicts, n.err
}
func (n *node) Explain(_ workload.AttachmentID, c explain.Connection) (explain.Explanation, error) {
	n.asked = append(n.asked, c)
	return n.explanation, n.err
}
func (n *node) Settings(workload.AttachmentID) ([]explain.Setting, bool, error) {
	return n.settings, n.silent, n.err
}
func (n *node) CountRunTime() (io.Closer, error)               { return io.NopCloser(nil), n.noTimes }
func (n *node) RunTimes() ([]runstats.RunTime, error)          { return n.times, nil }
func (n *node) Dump(workload.AttachmentID) ([]dump.Row, error) { return n.rows, n.err }
func (n *node) Find() ([]ended.Attachment, error)              { return n.left, n.err }
func (n *node) Remove(_ context.Context, a ended.Attachment) error {
	if err := n.stuck[a.Key]; err != nil {
		return err
	}
	n.collected = append(n.collected, a.Key)
	return nil
}
func (n *node) Events(ctx context.Context, deliver func(monitor.Event) error) error {
	if n.onEvents != nil {
		n.onEvents()
	}
	for _, event := range n.events {
		if err := deliver(event); err != nil {
			return err
		}
	}
	if n.err == nil {
		<-ctx.Done() // as the real one: no error
	}
	return n.err
}

// outcome is all that a run of the program has to show.
type outcome struct {
	code           int
	stdout, stderr string
}

// try runs the program as a script would, on the given node.
func try(t *testing.T, n *node, environment map[string]string, args ...string) outcome {
	t.Helper()
	return tryOn(t, n, false, environment, args...)
}

func tryOn(t *testing.T, n *node, terminal bool, environment map[string]string, args ...string) outcome {
	t.Helper()
	ui := cli.NewMockUi()
	code := run(args, base.Env{
		Ctx:      t.Context(),
		UI:       ui,
		Getenv:   func(name string) string { return environment[name] },
		Terminal: terminal,
		Uid:      n.uid,
		Open: func(paths store.Paths) base.Datapath {
			n.paths = paths
			return n
		},
		Ask: func(context.Context, string) (api.Status, error) {
			switch {
			case n.agent != nil:
				return *n.agent, nil
			case n.silence != nil:
				return api.Status{}, n.silence
			}
			return api.Status{}, fmt.Errorf("%w: %w", api.ErrNotRunning, fs.ErrNotExist)
		},
		AskEvents: func(_ context.Context, _ string, deliver func(monitor.Event) error) error {
			return n.agentEvents(deliver)
		},
		AskFlows: func(_ context.Context, _ string, query api.FlowQuery, deliver func(api.Flow) error) error {
			return n.agentFlows(query, deliver)
		},
		AskGuard: func(context.Context, string) (api.GuardList, error) {
			switch {
			case n.guard != nil:
				list := *n.guard
				list.Entries = slices.Clone(list.Entries)
				return list, nil
			case n.silence != nil:
				return api.GuardList{}, n.silence
			}
			return api.GuardList{}, fmt.Errorf("%w: %w", api.ErrNotRunning, fs.ErrNotExist)
		},
		AskChanges: n.agentChanges, AskBehind: n.agentBehind,
		AskTraffic: func(context.Context, string, time.Time) (api.Traffic, error) {
			if n.traffic == nil {
				return api.Traffic{}, fmt.Errorf("%w: %w", api.ErrNotRunning, fs.ErrNotExist)
			}
			return *n.traffic, nil
		},
		Clear:      func() { n.cleared++ },
		Journal:    func(context.Context, int) (string, error) { return n.log, n.noLog },
		Unit:       func() bool { return n.unit },
		Executable: func() (string, error) { return n.program, nil },
		Proc:       n.proc,

		Networks:       func(string) ([]cni.Attached, error) { return n.networks, n.err },
		RemoveNetworks: func(context.Context, string) (removed, kept []string, err error) { return n.bridges, n.others, n.err },
		Leftovers: func(where ended.Node) base.Leftovers {
			n.lookedAt = where
			return n
		},
	})
	return outcome{code: code, stdout: ui.OutputWriter.String(), stderr: ui.ErrorWriter.String()}
}

func want(t *testing.T, got, want outcome) {
	t.Helper()
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(outcome{})); diff != "" {
		t.Errorf("outcome (-want +got):\n%s", diff)
	}
}

func TestCalledAsThePlugin(t *testing.T) {
	got := try(t, &node{}, map[string]string{"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "0b5d0c1e"})
	want(t, got, outcome{code: 1, stdout: `{
  "cniVersion": "1.1.0",
  "code": 4,
  "msg": "this is the weir CLI, not the CNI plugin: put weir-cni in cni_path as weir and consul-cni",
  "details": "CNI_COMMAND is \"ADD\", CNI_CONTAINERID is \"0b5d0c1e\""
}
`})
}

func TestHelp(t *testing.T) {
	got := try(t, &node{}, nil, "-help")
	for _, name := range []string{"install", "uninstall", "load", "unload", "status", "workloads", "verdicts", "events", "flows", "version"} {
		if !strings.Contains(got.stdout, "\n    "+name+" ") {
			t.Errorf("help does not list %s:\n%s", name, got.stdout)
		}
	}
	for line := range strings.Lines(got.stdout) {
		if fields := strings.Fields(line); strings.HasPrefix(line, "    ") && (len(fields) < 3 || len([]rune(strings.TrimRight(line, "\n"))) > base.Columns) {
			t.Errorf("help says nothing of a command, or too much: %q", line)
		}
	}
	if got.code != 0 {
		t.Errorf("code = %d, want 0", got.code)
	}
}

func TestHelpOfCommand(t *testing.T) {
	want(t, try(t, &node{}, nil, "version", "-help"), outcome{stdout: `Usage: weir version [options]

  Prints the version of this program and what it was built with. It asks nothing
  of the node.

  Compare the programs of two nodes:

      $ weir version -json

Options:

  -json
      print JSON

`})
}

func TestEveryHelpHasAnExample(t *testing.T) {
	for name := range commands(base.Env{}) {
		got := try(t, &node{}, nil, append(strings.Fields(name), "-help")...)
		if example := "\n\n      $ weir " + name; got.code != 0 || !strings.Contains(got.stdout, example) {
			t.Errorf("weir %s -help has no line %q:\n%s", name, strings.TrimSpace(example), got.stdout)
		}
		for line := range strings.Lines(got.stdout) {
			if text := strings.TrimRight(line, "\n"); len([]rune(text)) > base.Columns {
				t.Errorf("weir %s -help: a line is too long:\n%s", name, text)
			}
		}
	}
}

// As with Nomad and Consul: 127, and nothing on standard output for a script to take for an answer.
func TestUnknownCommand(t *testing.T) {
	for _, c := range []struct{ command, guess string }{
		{"statsu", `: did you mean "status"?`},
		{"workload", `: did you mean "workloads"?`},
		{"verd", `: did you mean "verdicts"?`},
		{"reload", `: did you mean "load"?`},
		{"frobnicate", ""},
	} {
		want(t, try(t, &node{}, nil, c.command, "-json"), outcome{code: 127, stderr: fmt.Sprintf(`weir: no command is named %q%s
For the list of commands: weir -help
`, c.command, c.guess)})
	}
	want(t, try(t, &node{}, nil, "config", "validat"), outcome{code: 127, stderr: `weir: no command is named "config validat": did you mean "config validate"?
For the list of commands: weir -help
`})
	got := try(t, &node{}, nil)
	if got.code != 127 || got.stdout != "" || !strings.HasPrefix(got.stderr, "Usage: weir ") {
		t.Errorf("weir alone: %+v, want 127 and the list of commands on standard error", got)
	}
	if got := try(t, &node{}, nil, "-json", "version"); got.code != 1 || got.stdout != "" || !strings.HasPrefix(got.stderr, "Invalid flags before the subcommand") {
		t.Errorf("weir -json version: %+v, want an error on standard error", got)
	}
}

func TestUsageErrors(t *testing.T) {
	want(t, try(t, &node{}, nil, "load", "-force"), outcome{code: 1, stderr: `weir load: flag provided but not defined: -force
For the options: weir load -help
`})
	want(t, try(t, &node{}, nil, "status", "now"), outcome{code: 1, stderr: `weir status: unexpected argument "now"
For the options: weir status -help
`})
}

func TestPaths(t *testing.T) {
	n := &node{}
	try(t, n, map[string]string{"WEIR_PIN_DIR": "/env/pins", "WEIR_STATE_DIR": "/env/state"},
		"load", "-pin-dir", "/flag/pins", "-cgroup-root", "/flag/cgroup")
	if want := (store.Paths{PinDir: "/flag/pins", StateDir: "/env/state", CgroupRoot: "/flag/cgroup"}); n.paths != want {
		t.Errorf("paths = %+v, want %+v", n.paths, want)
	}
}

func TestVersion(t *testing.T) {
	got := try(t, &node{}, nil, "version")
	if !strings.HasPrefix(got.stdout, "weir v") || got.code != 0 {
		t.Errorf("outcome = %+v, want a version", got)
	}
	var info maintain.VersionInfo
	if err := json.Unmarshal([]byte(try(t, &node{}, nil, "version", "-json").stdout), &info); err != nil || info.Version != version {
		t.Errorf("version -json = %+v, %v; want version %s", info, err, version)
	}
}

// Without root a command tells that first, and nothing else: what a user may read of
// a node is not what is there.
func TestWithoutRoot(t *testing.T) {
	n := leftBehind()
	n.uid, n.status, n.program = 1000, healthy(), "/nowhere/weir"
	for name := range commands(base.Env{}) {
		variants := [][]string{strings.Fields(name)}
		switch name {
		case "version", "config validate":
			continue
		case "gc", "uninstall":
			variants = append(variants, []string{name, "-dry-run"})
		}
		for _, args := range variants {
			want(t, try(t, n, nil, args...), outcome{
				code: 1, stderr: "weir " + name + ": root is needed, and this is user ID 1000: run it with sudo, or as root\n",
			})
		}
	}
	// It changes nothing, and what it reads is for all to read.
	if got := try(t, n, nil, "install", "-dry-run"); !strings.HasPrefix(got.stderr, "note: this is user ID 1000: the installation itself needs root\n") {
		t.Errorf("weir install -dry-run = %+v", got)
	}
	if got := try(t, n, nil, "version"); got.code != 0 {
		t.Errorf("weir version = %+v", got)
	}
	if got := try(t, n, nil, "status", "-help"); got.code != 0 || !strings.HasPrefix(got.stdout, "Usage: weir status") {
		t.Errorf("weir status -help = %+v", got)
	}
}
