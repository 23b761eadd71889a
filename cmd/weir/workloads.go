// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/weirmesh/weir/redirect"
)

func newWorkloads(env env) *command {
	c := newCommand(env, "workloads", "List the allocations under Weir", `  Prints a line for each workload of this node: which allocation it is, how its
  proxy is told from its tasks, the proxy's ports, and how many destinations it
  holds of how many it may. What is wrong with a workload follows below.

  IDENTITY is "cgroup" where the proxy is known by UID and cgroup, "uid" where
  the UID alone decides: a task under that UID is not redirected.

  Where the agent runs, it follows what the agent knows of each allocation: its
  guard and whether the kernel is in step with Consul. It follows, too, what is not
  under Weir, with the reason. Its STATE is "unprotected" where that is wrong,
  "consul" where Consul's own rules redirect it, "host" for a gateway on the node's
  own network, and "unclaimed" for a proxy that is no allocation's.`).withPaths().withJSON()
	c.do = func() (int, error) {
		list, err := c.datapath().Workloads()
		if errors.Is(err, redirect.ErrUnreadable) {
			c.ui.Error("left out: " + err.Error())
		} else if err != nil {
			return 1, err
		}
		view, running, dead := c.agent()
		if c.json {
			return 0, c.printJSON(withAgent(list, view))
		}
		text := c.renderWorkloads(list)
		if running {
			text += "\n\n" + c.renderAgent(view, time.Now())
		} else if dead.What != "" {
			text += "\n\n" + strings.TrimRight(c.renderProblems("", []redirect.Problem{dead}), "\n")
		}
		c.ui.Output(text)
		return 0, nil
	}
	return c
}

func (c *command) renderWorkloads(list []redirect.WorkloadStatus) string {
	if len(list) == 0 {
		return "no workloads"
	}
	rows := [][]string{{"ID", "JOB", "GROUP", "MODE", "PROXY UID", "IDENTITY", "INBOUND", "OUTBOUND", "LISTENERS", "ORIGINS"}}
	var below strings.Builder
	for _, w := range list {
		rows = append(rows, []string{
			short(w.ID), orDash(w.Job), orDash(w.Group), string(w.Mode),
			fmt.Sprint(w.Proxy.UID), string(w.Proxy.Identity), port(w.Proxy.Inbound), port(w.Proxy.Outbound),
			fmt.Sprint(w.Proxy.Listeners), fmt.Sprintf("%d of %d", w.Origins, w.Budget),
		})
		for _, p := range w.Sidecars {
			rows = append(rows, []string{
				"", "", "+ " + p.Service, "", fmt.Sprint(p.UID), string(p.Identity), port(p.Inbound), port(p.Outbound), fmt.Sprint(p.Listeners), "",
			})
		}
		if len(w.Problems)+len(w.Notes) == 0 {
			continue
		}
		fmt.Fprintf(&below, "\n\n%s\n", c.paint(bold, name(w.Job, w.Group, w.Key)))
		below.WriteString(c.renderProblems("", w.Problems))
		for _, note := range w.Notes {
			fmt.Fprintf(&below, "  note: %s\n", note)
		}
	}
	return table("", rows) + strings.TrimRight(below.String(), "\n")
}

// port shows a port that is not known yet as such.
func port(number uint16) string {
	if number == 0 {
		return "-"
	}
	return fmt.Sprint(number)
}
