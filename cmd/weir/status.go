// SPDX-License-Identifier: MPL-2.0

package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent"
	"github.com/weirmesh/weir/redirect"
)

func newStatus(env env) *command {
	c := newCommand(env, "status", "Say whether this node is healthy", `  Says in its first line whether the node is healthy. Where it is not, it goes on
  with what is wrong and what to do about it: with the data path, with the agent
  and what it learns from Consul and Docker, and with allocations of the mesh. Its
  last lines say how the agent stands to Consul and what it mended since it began.

  The exit code is 0 when all is well and 1 when something is wrong, which
  includes that nothing is loaded, and that an agent which should run does not
  answer. Where none was started nothing is wrong: the data path works without.`).withPaths().withJSON()
	c.do = func() (int, error) {
		status, err := c.datapath().Status()
		if err != nil {
			return 1, err
		}
		view, running, dead := c.agent()
		if dead.What != "" {
			status.Problems = append(status.Problems, dead)
		}
		for _, problem := range view.Problems {
			same := func(p redirect.Problem) bool { return p.What == problem.What }
			if !slices.ContainsFunc(status.Problems, same) { // both may have seen it
				status.Problems = append(status.Problems, problem)
			}
		}
		code := 0
		if !status.Healthy() {
			code = 1
		}
		if c.json {
			whole := nodeStatus{Status: status}
			if running {
				whole.Agent = summarise(view)
			}
			return code, c.printJSON(whole)
		}
		text := c.renderStatus(status)
		switch {
		case running:
			text += "\n\n" + c.summary(view, time.Now())
		case dead.What == "":
			text += "\n\nagent: none runs, so nothing follows Consul and only allocations with transparent_proxy are under Weir"
		}
		c.ui.Output(text + c.leftoverLines())
		return code, nil
	}
	return c
}

// nodeStatus is the data path with what the agent adds. Problems are those of both.
type nodeStatus struct {
	redirect.Status
	Agent *agentSummary `json:"agent"` // null where none answers
}

// agentSummary is the agent's view, where the allocations are no more than
// counted: "weir workloads" has them.
type agentSummary struct {
	agent.Status
	Problems  *struct{}           `json:"problems,omitempty"` // they are the node's
	Workloads map[agent.State]int `json:"workloads"`
}

func summarise(view agent.Status) *agentSummary {
	summary := &agentSummary{Status: view, Workloads: make(map[agent.State]int)}
	for _, w := range view.Workloads {
		summary.Workloads[w.State]++
	}
	return summary
}

func (c *command) renderStatus(status redirect.Status) string {
	var text strings.Builder
	if status.Healthy() {
		fmt.Fprintln(&text, c.paint(green, "healthy: "+countOf(status.Workloads, "workload")))
	} else {
		fmt.Fprintln(&text, c.paint(red, "not healthy: "+countOf(len(status.Problems), "problem")))
	}
	text.WriteString(c.renderProblems("", status.Problems))
	if !status.Loaded {
		return strings.TrimRight(text.String(), "\n")
	}
	fmt.Fprintf(&text, "\n%s\n", table("", [][]string{
		{"pins", status.Paths.PinDir},
		{"records", status.Paths.StateDir},
		{"attached to", status.CgroupRoot},
		{"programs", orDash(strings.ReplaceAll(strings.Join(status.Links, " "), "weir_", ""))},
		{"changes", "wait for running programs by " + string(status.Barrier)},
	}))
	rows := [][]string{{"MAP", "MOST ENTRIES", "MEMORY"}}
	for _, info := range status.Maps {
		rows = append(rows, []string{info.Name, fmt.Sprint(info.MaxEntries), kibibytes(info.Bytes)})
	}
	if len(rows) > 1 {
		fmt.Fprintf(&text, "\n%s\n", table("", rows))
	}
	return strings.TrimRight(text.String(), "\n")
}

// renderProblems says what is wrong and what to do, a paragraph each.
func (c *command) renderProblems(indent string, problems []redirect.Problem) string {
	var text strings.Builder
	for _, problem := range problems {
		fmt.Fprintf(&text, "%s  %s\n%s    remedy: %s\n", indent, c.paint(red, problem.What), indent, problem.Remedy)
	}
	return text.String()
}

func countOf(count int, noun string) string {
	if count == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", count, noun)
}

func kibibytes(bytes uint64) string { return fmt.Sprintf("%d KiB", (bytes+1023)/1024) }
