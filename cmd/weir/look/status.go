// SPDX-License-Identifier: MPL-2.0

// Package look has the commands that say what there is: the node, its workloads, and what
// becomes of a connection.
package look

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
)

func NewStatus(env base.Env) *base.Command {
	c := base.New(env, "status", "Say whether this node is healthy", `  Says in its first line whether the node is healthy. Where it is not, it goes on
  with what is wrong and what to do about it: with the data path, with the agent
  and what it learns from Consul and Docker, and with allocations of the mesh. Its
  last lines say how the agent stands to Consul and what it repaired since it began.
  -verbose adds the mechanics: pins, programs, the size of each map, and the
  programs of others on the same hooks.

  The exit code is 0 when all is well and 1 when something is wrong, which
  includes that nothing is loaded, that an agent which should run does not answer,
  and that an allocation which ended holds a host port of one that runs. Where no
  agent was started nothing is wrong, as the data path works without, and the first
  line tells so: jobs without transparent_proxy are not guarded then.

  Fail a script where something is wrong, and keep what:

      $ weir status -json > status.json || exit 1`).WithPaths().WithJSON()
	c.Flags.Lookup("verbose").Usage = "print pins, programs, maps and the programs of others; and errors in full, with the kernel's verifier log"
	c.Do = func() (int, error) {
		var leftovers string
		var shadowed []health.Problem
		var beside sync.WaitGroup // a full node has much to look at, and each look waits for the disk and the kernel
		beside.Go(func() { leftovers, shadowed = listLeftBehind(c) })
		status, err := c.Datapath().Status()
		view, running, dead := c.Agent()
		beside.Wait()
		if err != nil {
			return 1, err
		}
		status.Problems = withAgents(status.Problems, view, dead)
		status.Problems = append(status.Problems, shadowed...)
		code := 0
		if !status.Healthy() {
			code = 1
		}
		if c.JSON || c.Verbose {
			c.Datapath().NameOthers(status.Others)
		}
		if c.JSON {
			whole := nodeStatus{Schema: base.Schema, Status: status}
			if running {
				whole.Agent = summarise(view)
			}
			return code, c.PrintJSON(whole)
		}
		text := renderStatus(c, status, running)
		switch {
		case running:
			text += "\n\n" + summary(c, view, time.Now())
		case dead.What == "":
			text += "\n\n" + base.Hang("agent: none runs, so nothing follows Consul, only allocations with transparent_proxy are under Weir, and what they dial before their proxy listens is refused") +
				"\n  " + base.Indented("next: "+base.StartAgent, 2)
		}
		c.UI.Output(text + leftovers)
		return code, nil
	}
	return c
}

// withAgents are the problems of the data path and those that the agent sees, or that it
// does not answer. Both may have seen one.
func withAgents(problems []health.Problem, view api.Status, dead health.Problem) []health.Problem {
	if dead.What != "" {
		problems = append(problems, dead)
	}
	for _, problem := range view.Problems {
		same := func(p health.Problem) bool { return p.What == problem.What && p.AllocID == problem.AllocID }
		if !slices.ContainsFunc(problems, same) {
			problems = append(problems, problem)
		}
	}
	return problems
}

// nodeStatus is the data path with what the agent adds. Problems are those of both.
type nodeStatus struct {
	Schema int `json:"schema"`
	inspect.Status
	Agent *agentSummary `json:"agent"` // null where none answers
}

// agentSummary is the agent's view, where the allocations are no more than
// counted: "weir workloads" has them.
type agentSummary struct {
	api.Status
	Problems  *struct{}         `json:"problems,omitempty"` // they are the node's
	Workloads map[api.State]int `json:"workloads"`
}

func summarise(view api.Status) *agentSummary {
	summary := &agentSummary{Status: view, Workloads: make(map[api.State]int)}
	for _, w := range view.Workloads {
		summary.Workloads[w.State]++
	}
	return summary
}

// renderStatus is the view of the data path. Its first line tells where no agent
// answers: all that only has an upstream is without a guard then.
func renderStatus(c *base.Command, status inspect.Status, withAgent bool) string {
	var text strings.Builder
	switch problems := "not healthy: " + base.CountOf(len(status.Problems), "problem"); {
	case !status.Healthy() && withAgent:
		fmt.Fprintln(&text, c.Paint(base.Red, problems))
	case !status.Healthy():
		fmt.Fprintln(&text, c.Paint(base.Red, problems+"; no agent answers, so plain connect jobs are not guarded"))
	case withAgent:
		fmt.Fprintln(&text, c.Paint(base.Green, "healthy: "+base.CountOf(status.Workloads, "workload")))
	default:
		fmt.Fprintln(&text, c.Paint(base.Yellow, "healthy: "+base.CountOf(status.Workloads, "workload")+"; no agent runs, so plain connect jobs are not guarded"))
	}
	text.WriteString(renderProblems(c, status.Problems))
	switch {
	case !status.Loaded:
	case c.Verbose:
		text.WriteString(renderMechanics(status))
		text.WriteString(renderOthers(status.Others))
	case len(status.Others) > 0:
		fmt.Fprintf(&text, "\n%s of others on the same hooks: -verbose lists them\n", base.CountOf(len(status.Others), "program"))
	}
	return strings.TrimRight(text.String(), "\n")
}

// renderMechanics is what few ask for: where the state is, and what is loaded.
func renderMechanics(status inspect.Status) string {
	var text strings.Builder
	fmt.Fprintf(&text, "\n%s\n", base.Table("", base.WrapLast([][]string{
		{"pins", status.Paths.PinDir},
		{"records", status.Paths.StateDir},
		{"attached to", status.CgroupRoot},
		{"programs", base.OrDash(strings.ReplaceAll(strings.Join(status.Links, " "), "weir_", ""))},
		{"changes", "wait for running programs by " + string(status.Barrier)},
	}, base.Columns)))
	rows := [][]string{{"MAP", "ROWS", "MOST ENTRIES", "MEMORY"}}
	for _, info := range status.Maps {
		used := "-"
		if info.Counted {
			used = fmt.Sprint(info.Rows)
		}
		rows = append(rows, []string{info.Name, used, fmt.Sprint(info.MaxEntries), kibibytes(info.Bytes)})
	}
	if len(rows) > 1 {
		fmt.Fprintf(&text, "\n%s\n", base.Table("", rows))
	}
	return text.String()
}

// renderOthers names the programs of others on the same hooks. What each of them
// does only its owner knows, so they are no problem by themselves.
func renderOthers(others []inspect.Other) string {
	if len(others) == 0 {
		return ""
	}
	rows := [][]string{{"PROGRAM OF OTHERS", "ID", "HOOK", "RUNS", "EFFECT", "HELD BY"}}
	for _, other := range others {
		name, holder := other.Name, other.Pinned
		if other.Weir {
			name += " (another Weir)"
		}
		if holder == "" {
			holder = other.Owner
		}
		rows = append(rows, []string{base.OrDash(name), fmt.Sprint(other.ID), other.Hook, base.OrDash(other.Order), other.Effect, base.OrDash(holder)})
	}
	return "\n" + base.Table("", rows) + "\n"
}

// renderProblems says what is wrong and what to do, a paragraph each. The code at
// the end of the first line is a heading of the runbook.
func renderProblems(c *base.Command, problems []health.Problem) string {
	var text strings.Builder
	for _, problem := range problems {
		colour := base.Red
		if problem.Severity == health.SeverityWarning {
			colour = base.Yellow
		}
		fmt.Fprintf(&text, "  %s\n    %s\n", c.Paint(colour, base.Indented(problem.Text(), 2)), base.Indented("remedy: "+problem.Remedy, 4))
	}
	return text.String()
}

func kibibytes(bytes uint64) string { return fmt.Sprintf("%d KiB", (bytes+1023)/1024) }
