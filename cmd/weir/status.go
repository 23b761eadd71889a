// SPDX-License-Identifier: MPL-2.0

package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/weirmesh/weir/redirect"
)

func newStatus(env env) *command {
	c := newCommand(env, "status", "Say whether this node's data path is healthy", `  Says in its first line whether the data path is healthy. Where it is not, it
  goes on with what is wrong and what to do about it. Where the agent runs, its
  last lines say how it stands to Consul and Docker, what it mended since it
  began, and how many allocations of the mesh are not under Weir.

  The exit code is 0 when all is well and 1 when something is wrong, which
  includes that nothing is loaded.`).withPaths().withJSON()
	c.do = func() (int, error) {
		status, err := c.datapath().Status()
		if err != nil {
			return 1, err
		}
		code := 0
		if !status.Healthy() {
			code = 1
		}
		if c.json {
			return code, c.printJSON(status)
		}
		text := c.renderStatus(status)
		if view, running := c.agent(); running {
			text += "\n\n" + c.summary(view, time.Now())
		}
		c.ui.Output(text + c.leftoverLines())
		return code, nil
	}
	return c
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
