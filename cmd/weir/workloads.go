// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// workloadsReport is what workloads prints as JSON.
type workloadsReport struct {
	Schema    int            `json:"schema"`
	Workloads []seenWorkload `json:"workloads"`
}

func newWorkloads(env env) *command {
	c := newCommand(env, "workloads", "List the allocations of the mesh and whether they are protected", `  Prints a line for each allocation of the mesh on this node, or for one of them,
  or for those of one job. What is wrong with one, and why one is not protected,
  follows below.

  PROTECTED is "yes" where no TCP connection from outside reaches a task past the
  proxy, "audit" where one is let in and counted, and "no" where nothing sees it or
  something is wrong. About UDP decides GUARD. A port that the job maps or excludes
  is open in each case. EGRESS is the egress guard, and a column only where an
  allocation has one.

  BY is what protects: the redirect of a transparent allocation, or the guard of
  another one. With "consul" it is Consul's own rules, from before Weir, and with
  "host" a gateway on the node's own network has nothing around it.

  PROXY is "up" while a listener of it is known to the kernel. CONSUL is "in sync"
  where the kernel has what Consul has registered, "behind" where the agent still
  brings it there, and "absent" without a registration. A "-" stands for what is not
  known, as without an agent.

  Names that do not fit are cut, and -verbose shows them whole, with IDs, ports and
  upstreams. IDENTITY is "cgroup" there where the proxy is known by UID and cgroup,
  and "uid" where the UID alone decides: a task under that UID is not redirected.

  Show the allocations of job api:

      $ weir workloads api`).withPaths().withJSON().withSelection()
	c.flags.Lookup("verbose").Usage = "print every column and whole names; and errors in full, with the kernel's verifier log"
	c.do = func() (int, error) {
		datapath := c.datapath()
		view, running, dead := c.agent()
		chosen, keys, err := c.chooseWorkloads(datapath, view)
		if err != nil {
			return 1, err
		}
		list, err := c.lookAt(datapath, chosen, keys)
		if err != nil {
			return 1, err
		}
		seen := slices.DeleteFunc(withAgent(list, view), func(w seenWorkload) bool { return !chosen.has(w.named()) })
		if c.json {
			return 0, c.printJSON(workloadsReport{Schema: jsonSchema, Workloads: seen})
		}
		text := c.renderWorkloads(seen, time.Now())
		if running {
			text += "\n\n" + strings.Join(c.sources(view, time.Now()), "\n")
		} else if dead.What != "" {
			text += "\n\n" + strings.TrimRight(c.renderProblems([]health.Problem{dead}), "\n")
		}
		c.ui.Output(text)
		return 0, nil
	}
	return c
}

// chooseWorkloads finds what the operand names, and the keys of those that have a record:
// nobody looks at a namespace that is not asked about.
func (c *command) chooseWorkloads(datapath datapath, view api.Status) (chosen selection, keys []workload.AttachmentID, err error) {
	if c.operand() == "" {
		return chosen, nil, nil
	}
	known, err := datapath.Records()
	if err != nil && !errors.Is(err, store.ErrUnreadable) {
		return chosen, nil, err
	}
	var names []named
	for _, r := range known {
		names = append(names, namedRecord(r))
	}
	for _, w := range view.Workloads {
		names = append(names, named{w.ID, w.Job, w.Group})
	}
	if chosen, err = selectWorkloads(c.operand(), names); err != nil {
		return chosen, nil, err
	}
	for _, r := range known {
		if chosen.has(namedRecord(r)) {
			keys = append(keys, r.Key)
		}
	}
	return chosen, keys, nil
}

// lookAt returns the workloads of the keys; all of them where none were chosen.
func (c *command) lookAt(datapath datapath, chosen selection, keys []workload.AttachmentID) ([]inspect.WorkloadStatus, error) {
	if chosen != (selection{}) && len(keys) == 0 {
		return nil, nil // what was chosen has no record
	}
	list, err := datapath.Workloads(keys...)
	if errors.Is(err, store.ErrUnreadable) {
		c.ui.Error("left out: " + err.Error())
		err = nil
	}
	return list, err
}

func (c *command) renderWorkloads(list []seenWorkload, now time.Time) string {
	if len(list) == 0 {
		return "no workloads"
	}
	var text string
	if c.verbose {
		text = table("", wideRows(list, now))
	} else {
		rows := [][]string{{"ID", "JOB", "GROUP", "PROTECTED", "BY", "PROXY", "GUARD", "CONSUL"}}
		for _, w := range list {
			rows = append(rows, []string{
				short(w.ID), orDash(w.Job), orDash(w.Group), w.protection().answer, w.protection().by, w.proxy(), orDash(string(w.Guard)), w.consul(),
			})
		}
		if slices.ContainsFunc(list, func(w seenWorkload) bool { return w.Egress == workload.GuardAudit || w.Egress == workload.GuardEnforce }) {
			rows[0] = slices.Insert(rows[0], 7, "EGRESS")
			for i, w := range list {
				rows[i+1] = slices.Insert(rows[i+1], 7, orDash(string(w.Egress)))
			}
		}
		text = table("", cut(rows, 80, 1, 2))
	}
	return text + strings.TrimRight(c.renderReasons(list)+c.renderProblemsOf(list), "\n")
}

// wideRows is all that is known of each workload.
func wideRows(list []seenWorkload, now time.Time) [][]string {
	rows := [][]string{{"ID", "JOB", "GROUP", "PROTECTED", "BY", "STATE", "MODE", "KIND", "TASK", "PROXY", "PROXY UID", "IDENTITY",
		"INBOUND", "OUTBOUND", "LISTENERS", "ORIGINS", "GUARD", "EGRESS", "CONSUL", "SINCE", "UPSTREAMS", "OPEN"}}
	for _, w := range list {
		view := w.Agent
		since := "-"
		if view == nil {
			view = &api.WorkloadView{}
		} else if !view.Since.IsZero() {
			since = now.Sub(view.Since).Round(time.Second).String()
		}
		var kinds, upstreams []string
		for _, p := range view.Proxies {
			kinds = append(kinds, p.Kind)
		}
		for _, u := range view.Upstreams {
			upstreams = append(upstreams, fmt.Sprintf("%s=%s", u.Name, u.Listener))
		}
		row := []string{w.ID, orDash(w.Job), orDash(w.Group), w.protection().answer, w.protection().by, orDash(string(view.State)),
			orDash(string(w.Mode)), orDash(strings.Join(kinds, " ")), orDash(view.Task), w.proxy()}
		kernel := []string{"-", "-", "-", "-", "-", "-"}
		if !w.outside {
			kernel = append(proxyCells(w.Proxy), fmt.Sprintf("%d of %d", w.Origins, w.Budget))
		}
		row = append(append(row, kernel...), orDash(string(w.Guard)), orDash(string(w.Egress)), w.consul(), since,
			orDash(strings.Join(upstreams, " ")), orDash(strings.Trim(fmt.Sprint(view.Open), "[]")))
		rows = append(rows, row)
		for _, p := range w.Sidecars {
			rows = append(rows, append([]string{"", "", "+ " + p.Service, "", "", "", "", "", "", ""}, proxyCells(p)...))
		}
	}
	return rows
}

func proxyCells(p inspect.ProxyStatus) []string {
	return []string{fmt.Sprint(p.UID), orDash(string(p.Identity)), port(p.Inbound), port(p.Outbound), fmt.Sprint(p.Listeners)}
}

// renderReasons says why workloads are not, or not wholly, protected: once for all that have a reason
// in common.
func (c *command) renderReasons(list []seenWorkload) string {
	const most = 5
	var order []string
	who := make(map[string][]string)
	for _, w := range list {
		p := w.protection()
		if p.why == "" {
			continue
		}
		reason := p.answer + ": " + p.why
		if len(who[reason]) == 0 {
			order = append(order, reason)
		}
		who[reason] = append(who[reason], short(w.ID))
	}
	var text strings.Builder
	for _, reason := range order {
		ids := who[reason]
		more := ""
		if len(ids) > most {
			more = fmt.Sprintf(" and %d more", len(ids)-most)
		}
		fmt.Fprintf(&text, "\n\n%s\n  %s%s", c.paint(yellow, hang(reason)), strings.Join(ids[:min(len(ids), most)], " "), more)
	}
	return text.String()
}

// renderProblemsOf says what is wrong with each workload and what to do, a paragraph each.
func (c *command) renderProblemsOf(list []seenWorkload) string {
	var text strings.Builder
	for _, w := range list {
		problems := w.problems()
		if len(problems)+len(w.Notes) == 0 {
			continue
		}
		fmt.Fprintf(&text, "\n\n%s\n%s", c.paint(bold, name(w.Job, w.Group, w.Key)), c.renderProblems(ownProblems(problems)))
		for _, note := range w.Notes {
			fmt.Fprintf(&text, "  %s\n", indented("note: "+note, 2))
		}
	}
	return text.String()
}

// ownProblems are those of one workload, for where its name stands above them.
func ownProblems(problems []health.Problem) (list []health.Problem) {
	for _, problem := range problems {
		list = append(list, problem.Of("", problem.AllocID))
	}
	return list
}

// port shows a port that is not known yet as such.
func port(number uint16) string {
	if number == 0 {
		return "-"
	}
	return fmt.Sprint(number)
}

// cut shortens the cells of some columns, the longest first, until the table is no wider than asked.
func cut(rows [][]string, width int, columns ...int) [][]string {
	const gap, least = 2, 6
	widths := make([]int, len(rows[0]))
	total := -gap
	for column := range widths {
		for _, row := range rows {
			widths[column] = max(widths[column], len([]rune(row[column])))
		}
		total += widths[column] + gap
	}
	for ; total > width; total-- {
		widest := slices.MaxFunc(columns, func(a, b int) int { return widths[a] - widths[b] })
		if widths[widest] <= least {
			break
		}
		widths[widest]--
	}
	for _, row := range rows {
		for _, column := range columns {
			if cell := []rune(row[column]); len(cell) > widths[column] {
				row[column] = string(cell[:widths[column]-1]) + "…"
			}
		}
	}
	return rows
}
