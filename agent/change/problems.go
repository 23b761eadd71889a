// SPDX-License-Identifier: MPL-2.0

package change

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/health"
)

// problemKey is what a problem keeps while its text changes, as with a count in it.
type problemKey struct{ code, subject, allocID string }

type problem struct {
	since time.Time
	what  string
	of    api.Change // whose it is
}

// Problems compares what is wrong with what was, and notes what began and what is over.
// An allocation's problem begins when it has settled, as in "weir status", and is over when
// the allocation has it no more. An agent that began a moment ago has not found all that
// is wrong, so that it ends none.
func (l *Log) Problems(node []health.Problem, workloads []api.WorkloadView, now time.Time, ends bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	there := make(map[problemKey]bool)
	for _, p := range node {
		l.problem(p, api.Change{AllocID: p.AllocID}, true, now, there)
	}
	for _, w := range workloads {
		for _, p := range w.Problems {
			l.problem(p, of(w), w.Settled(now), now, there)
		}
	}
	if !ends {
		return
	}
	var over []problemKey
	for key := range l.problems {
		if !there[key] {
			over = append(over, key)
		}
	}
	slices.SortFunc(over, func(a, b problemKey) int {
		return cmp.Or(strings.Compare(a.allocID, b.allocID), strings.Compare(a.code, b.code))
	})
	for _, key := range over {
		p := l.problems[key]
		delete(l.problems, key)
		c := p.of
		c.Time, c.Kind = now, api.ChangeSolved
		c.What = fmt.Sprintf("after %s: %s", now.Sub(p.since).Round(time.Second), p.what)
		l.note(c)
	}
}

func (l *Log) problem(p health.Problem, whose api.Change, settled bool, now time.Time, there map[problemKey]bool) {
	key := problemKey{p.Code, p.Subject, p.AllocID}
	if _, known := l.problems[key]; known {
		there[key] = true
		return
	}
	if !settled {
		return
	}
	there[key] = true
	if whose.AllocID != "" {
		p.Subject = "" // it is told beside
	}
	whose.Time, whose.Kind, whose.What, whose.Code, whose.Severity = now, api.ChangeProblem, p.Text(), p.Code, string(p.Severity)
	l.problems[key] = problem{now, whose.What, whose}
	l.note(whose)
}

// of is a change of the workload that says nothing yet.
func of(w api.WorkloadView) api.Change {
	return api.Change{AllocID: w.ID, Namespace: w.Namespace, Job: w.Job, TaskGroup: w.Group}
}

// Workload notes a change of a workload.
func (l *Log) Workload(w api.WorkloadView, kind api.ChangeKind, what string, now time.Time) {
	c := of(w)
	c.Time, c.Kind, c.What = now, kind, what
	l.Note(c)
}

// State notes what the agent makes of a workload, where that is another thing than before.
func (l *Log) State(before, now api.WorkloadView, at time.Time) {
	if now.State != before.State {
		switch now.State {
		case api.StateManaged:
			what := fmt.Sprintf("under Weir, mode %s", now.Mode)
			if now.Guard != "" {
				what += fmt.Sprintf(", guard %s", now.Guard)
			}
			l.Workload(now, api.ChangeAdded, what, at)
		case api.StateConsul:
			l.Workload(now, api.ChangeState, "Consul's own rules redirect it, and Weir leaves it alone", at)
		case api.StateEnded:
			l.Workload(now, api.ChangeState, "it ended, and nobody ended its network", at)
		case api.StateHost:
			l.Workload(now, api.ChangeState, "a gateway on the node's own network", at)
		case api.StateUnprotected, api.StateUnclaimed, api.StateOutside: // the first two are problems
		}
	}
	if now.State != before.State || (len(before.Proxies) == 0) == (len(now.Proxies) == 0) {
		return // what is new in the mesh is there by its registration, or has none yet
	}
	if len(now.Proxies) == 0 {
		l.Workload(now, api.ChangeConfig, "Consul has no registration of its proxy any more: the last configuration stays", at)
		return
	}
	l.Workload(now, api.ChangeConfig, "its proxy is registered in Consul", at)
}
