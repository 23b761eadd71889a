// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/api"
)

func changed() *node {
	now := time.Now()
	at := func(ago time.Duration) time.Time { return now.Add(-ago) }
	return &node{changes: &api.ChangeList{Schema: 1, Since: at(time.Hour), Began: at(3 * time.Hour), Changes: []api.Change{
		{Time: at(9 * time.Minute), Kind: api.ChangeAdded, AllocID: "0b5d0c1e-7c0f", Job: "demo-of-a-long-name", TaskGroup: "web", What: "under Weir, mode direct, guard audit"},
		{Time: at(8 * time.Minute), Kind: api.ChangeProblem, AllocID: "0b5d0c1e-7c0f", Job: "demo-of-a-long-name", TaskGroup: "web", What: "its proxy does not listen on port 20001: nothing does [proxy-not-listening]", Code: "proxy-not-listening", Severity: "error"},
		{Time: at(7 * time.Minute), Kind: api.ChangeConfig, AllocID: "1c6e1d2f-8d1a", Job: "shop", What: "guard audit -> enforce"},
		{Time: at(6 * time.Minute), Kind: api.ChangeAgent, What: "the configuration is reloaded"},
		{Time: at(5 * time.Minute), Kind: api.ChangeSolved, AllocID: "0b5d0c1e-7c0f", Job: "demo-of-a-long-name", TaskGroup: "web", What: "after 3m0s: its proxy does not listen [proxy-not-listening]"},
	}}}
}

// agentChanges is what the agent answers.
func (n *node) agentChanges(_ context.Context, _ string, since time.Time) (api.ChangeList, error) {
	if n.changes == nil {
		return api.ChangeList{}, fmt.Errorf("%w: %w", api.ErrNotRunning, fs.ErrNotExist)
	}
	n.since = since
	list := *n.changes
	list.Changes = slices.Clone(list.Changes)
	return list, nil
}

// clock is the time of a change, as it is shown.
func (n *node) clock(i int) string {
	return n.changes.Changes[i].Time.Local().Format("15:04:05")
}

func TestChanges(t *testing.T) {
	n := changed()
	all := `TIME      ALLOC     JOB             WHAT
` + n.clock(0) + `  0b5d0c1e  demo-of-a-lon…  added: under Weir, mode direct, guard audit
` + n.clock(1) + `  0b5d0c1e  demo-of-a-lon…  problem: its proxy does not listen on port
                                    20001: nothing does [proxy-not-listening]
` + n.clock(2) + `  1c6e1d2f  shop            config: guard audit -> enforce
` + n.clock(3) + `  -         -               the configuration is reloaded
` + n.clock(4) + `  0b5d0c1e  demo-of-a-lon…  solved: after 3m0s: its proxy does not
                                    listen [proxy-not-listening]

5 changes since ` + n.changes.Since.Local().Format(time.DateTime) + "\n"
	listed := try(t, n, nil, "changes")
	listed.stdout = regexp.MustCompile(`(?m)^\d{4}-\d\d-\d\d\n`).ReplaceAllString(listed.stdout, "") // of a test at midnight
	want(t, listed, outcome{stdout: all})
	if ago := time.Since(n.since); ago < time.Hour || ago > time.Hour+time.Minute {
		t.Errorf("asked for the last %s, want an hour", ago)
	}
	got := try(t, n, nil, "changes", "shop", "-since", "10m")
	if got.code != 0 || !strings.Contains(got.stdout, "guard audit -> enforce\n\n1 change since") || strings.Contains(got.stdout, "demo") {
		t.Errorf("weir changes shop: %+v, want its change alone", got)
	}
	if ago := time.Since(n.since); ago > 11*time.Minute {
		t.Errorf("asked for the last %s, want ten minutes", ago)
	}
	if got := try(t, n, nil, "changes", "sop"); got.code != 1 || !strings.Contains(got.stderr, `did you mean job "shop"?`) {
		t.Errorf("weir changes sop: %+v", got)
	}
	coloured := tryOn(t, n, true, nil, "changes").stdout
	if !strings.Contains(coloured, "\x1b[31m"+n.clock(1)) || !strings.Contains(coloured, "\x1b[32m"+n.clock(4)) || strings.Contains(coloured, "\x1b[31m"+n.clock(2)) {
		t.Errorf("on a terminal: %q, want the problem in red and its end in green", coloured)
	}
}

func TestChangesOfAnAgentThatJustBegan(t *testing.T) {
	n := &node{changes: &api.ChangeList{Schema: 1, Changes: []api.Change{}, Omitted: 2}}
	n.changes.Began = time.Now().Add(-5 * time.Minute)
	n.changes.Since = n.changes.Began
	want(t, try(t, n, nil, "changes"), outcome{stdout: "nothing changed since " + n.changes.Since.Local().Format(time.DateTime) + `
The agent began 5m ago. Of what was before, its log tells:
  'journalctl -u weir-agent', or 'nomad alloc logs' of its job
not listed: 2 older changes that gave way to later ones
`})
	got := try(t, &node{}, nil, "changes")
	if got.code != 1 || !strings.Contains(got.stderr, "the agent does not run: it keeps the list; next: 'systemctl enable --now weir-agent'") {
		t.Errorf("without an agent: %+v", got)
	}
}

// What happened on another day has its date above it.
func TestChangesOfYesterday(t *testing.T) {
	n := changed()
	n.changes.Changes = n.changes.Changes[:1]
	n.changes.Changes[0].Time = n.changes.Changes[0].Time.Add(-48 * time.Hour)
	day := n.changes.Changes[0].Time.Local().Format(time.DateOnly)
	if got := try(t, n, nil, "changes", "-since", "72h"); !strings.Contains(got.stdout, "WHAT\n"+day+"\n"+n.clock(0)) {
		t.Errorf("weir changes -since 72h: %+v", got)
	}
}
