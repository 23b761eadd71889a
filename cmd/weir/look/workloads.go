// SPDX-License-Identifier: MPL-2.0

package look

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
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

func NewWorkloads(env base.Env) *base.Command {
	c := base.New(env, "workloads", "List the allocations of the mesh and whether they are protected", `  Prints a line for each allocation of the mesh on this node, or for one of them,
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

      $ weir workloads api`).WithPaths().WithJSON().WithSelection()
	c.Flags.Lookup("verbose").Usage = "print every column and whole names; and errors in full, with the kernel's verifier log"
	c.Do = func() (int, error) {
		datapath := c.Datapath()
		view, running, dead := c.Agent()
		chosen, keys, err := chooseWorkloads(c, datapath, view)
		if err != nil {
			return 1, err
		}
		list, err := lookAt(c, datapath, chosen, keys)
		if err != nil {
			return 1, err
		}
		seen := slices.DeleteFunc(withAgent(list, view), func(w seenWorkload) bool { return !chosen.Has(w.named()) })
		if c.JSON {
			return 0, c.PrintJSON(workloadsReport{Schema: base.Schema, Workloads: seen})
		}
		text := renderWorkloads(c, seen, time.Now())
		if running {
			text += "\n\n" + strings.Join(sources(c, view, time.Now()), "\n")
		} else if dead.What != "" {
			text += "\n\n" + strings.TrimRight(renderProblems(c, []health.Problem{dead}), "\n")
		}
		c.UI.Output(text)
		return 0, nil
	}
	return c
}

// chooseWorkloads finds what the operand names, and the keys of those that have a record:
// nobody looks at a namespace that is not asked about.
func chooseWorkloads(c *base.Command, datapath base.Datapath, view api.Status) (chosen base.Selection, keys []workload.AttachmentID, err error) {
	if c.Operand() == "" {
		return chosen, nil, nil
	}
	known, err := datapath.Records()
	if err != nil && !errors.Is(err, store.ErrUnreadable) {
		return chosen, nil, err
	}
	var names []base.Named
	for _, r := range known {
		names = append(names, base.NamedRecord(r))
	}
	for _, w := range view.Workloads {
		names = append(names, base.Named{ID: w.ID, Job: w.Job, Group: w.Group})
	}
	if chosen, err = base.SelectWorkloads(c.Operand(), names); err != nil {
		return chosen, nil, err
	}
	for _, r := range known {
		if chosen.Has(base.NamedRecord(r)) {
			keys = append(keys, r.Key)
		}
	}
	return chosen, keys, nil
}

// lookAt returns the workloads of the keys; all of them where none were chosen.
func lookAt(c *base.Command, datapath base.Datapath, chosen base.Selection, keys []workload.AttachmentID) ([]inspect.WorkloadStatus, error) {
	if chosen != (base.Selection{}) && len(keys) == 0 {
		return nil, nil // what was chosen has no record
	}
	list, err := datapath.Workloads(keys...)
	if errors.Is(err, store.ErrUnreadable) {
		c.UI.Error("left out: " + err.Error())
		err = nil
	}
	return list, err
}

func renderWorkloads(c *base.Command, list []seenWorkload, now time.Time) string {
	if len(list) == 0 {
		return "no workloads"
	}
	var text string
	if c.Verbose {
		text = base.Table("", wideRows(list, now))
	} else {
		rows := [][]string{{"ID", "JOB", "GROUP", "PROTECTED", "BY", "PROXY", "GUARD", "CONSUL"}}
		for _, w := range list {
			rows = append(rows, []string{
				base.Short(w.ID), base.OrDash(w.Job), base.OrDash(w.Group), w.protection().answer, w.protection().by, w.proxy(), base.OrDash(string(w.Guard)), w.consul(),
			})
		}
		if slices.ContainsFunc(list, func(w seenWorkload) bool { return w.Egress == workload.GuardAudit || w.Egress == workload.GuardEnforce }) {
			rows[0] = slices.Insert(rows[0], 7, "EGRESS")
			for i, w := range list {
				rows[i+1] = slices.Insert(rows[i+1], 7, base.OrDash(string(w.Egress)))
			}
		}
		text = base.Table("", base.Cut(rows, 80, 1, 2))
	}
	return text + strings.TrimRight(renderReasons(c, list)+renderProblemsOf(c, list), "\n")
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
		row := []string{w.ID, base.OrDash(w.Job), base.OrDash(w.Group), w.protection().answer, w.protection().by, base.OrDash(string(view.State)),
			base.OrDash(string(w.Mode)), base.OrDash(strings.Join(kinds, " ")), base.OrDash(view.Task), w.proxy()}
		kernel := []string{"-", "-", "-", "-", "-", "-"}
		if !w.outside {
			kernel = append(proxyCells(w.Proxy), fmt.Sprintf("%d of %d", w.Origins, w.Budget))
		}
		row = append(append(row, kernel...), base.OrDash(string(w.Guard)), base.OrDash(string(w.Egress)), w.consul(), since,
			base.OrDash(strings.Join(upstreams, " ")), base.OrDash(strings.Trim(fmt.Sprint(view.Open), "[]")))
		rows = append(rows, row)
		for _, p := range w.Sidecars {
			rows = append(rows, append([]string{"", "", "+ " + p.Service, "", "", "", "", "", "", ""}, proxyCells(p)...))
		}
	}
	return rows
}

func proxyCells(p inspect.ProxyStatus) []string {
	return []string{fmt.Sprint(p.UID), base.OrDash(string(p.Identity)), port(p.Inbound), port(p.Outbound), fmt.Sprint(p.Listeners)}
}

// renderReasons says why workloads are not, or not wholly, protected: once for all that have a reason
// in common.
func renderReasons(c *base.Command, list []seenWorkload) string {
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
		who[reason] = append(who[reason], base.Short(w.ID))
	}
	var text strings.Builder
	for _, reason := range order {
		ids := who[reason]
		more := ""
		if len(ids) > most {
			more = fmt.Sprintf(" and %d more", len(ids)-most)
		}
		fmt.Fprintf(&text, "\n\n%s\n  %s%s", c.Paint(base.Yellow, base.Hang(reason)), strings.Join(ids[:min(len(ids), most)], " "), more)
	}
	return text.String()
}

// renderProblemsOf says what is wrong with each workload and what to do, a paragraph each.
func renderProblemsOf(c *base.Command, list []seenWorkload) string {
	var text strings.Builder
	for _, w := range list {
		problems := w.problems()
		if len(problems)+len(w.Notes) == 0 {
			continue
		}
		fmt.Fprintf(&text, "\n\n%s\n%s", c.Paint(base.Bold, base.WorkloadName(w.Job, w.Group, w.Key)), renderProblems(c, ownProblems(problems)))
		for _, note := range w.Notes {
			fmt.Fprintf(&text, "  %s\n", base.Indented("note: "+note, 2))
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
