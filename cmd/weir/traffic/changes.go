// SPDX-License-Identifier: MPL-2.0

package traffic

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/mitchellh/go-wordwrap"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/store"
)

func NewChanges(env base.Env) *base.Command {
	c := base.New(env, "changes", "Show what changed on this node of late", `  Prints a line for each change, the oldest first: allocations that came under Weir
  and went, what Consul and the operator want of them now, what went wrong and since
  when that is over, what was repaired, and what the agent did to the node. Without
  -since it is the last hour.

  An intention is not among them: Consul's proxies follow it, and 'weir explain' asks
  Consul what it is now. Connections are what 'weir flows' shows.

  The agent keeps the newest 4096 in memory, and of one allocation the newest 64. Of
  what was before it began, its log tells.

  See what changed about job api in the last ten minutes:

      $ weir changes -since 10m api`).WithPaths().WithJSON().WithSelection()
	moment := c.Flags.String("since", "1h", "not older than this `time`: 10m, or 2006-01-02T15:04:05Z")
	c.Do = func() (int, error) {
		since, err := api.ParseMoment(*moment, time.Now())
		if err != nil {
			return 1, fmt.Errorf("read -since: %w", err)
		}
		ctx, cancel := context.WithTimeout(c.Ctx, 10*time.Second)
		defer cancel()
		list, err := c.AskChanges(ctx, c.StateDir(), since)
		if errors.Is(err, api.ErrNotRunning) {
			return 1, fmt.Errorf("%w: it keeps the list; next: %s", api.ErrNotRunning, base.StartAgent)
		}
		if err != nil {
			return 1, err
		}
		if list.Changes, err = selectChanges(c, list.Changes); err != nil {
			return 1, err
		}
		if c.JSON {
			return 0, c.PrintJSON(list)
		}
		c.UI.Output(renderChanges(c, list, time.Now()))
		return 0, nil
	}
	return c
}

// selectChanges takes what the operand names. It may have ended meanwhile.
func selectChanges(c *base.Command, list []api.Change) ([]api.Change, error) {
	who := func(change api.Change) base.Named {
		return base.Named{ID: change.AllocID, Job: change.Job, Group: change.TaskGroup}
	}
	var names []base.Named
	for _, change := range list {
		if change.AllocID != "" {
			names = append(names, who(change))
		}
	}
	known, err := c.Datapath().Records()
	if err != nil && !errors.Is(err, store.ErrUnreadable) {
		return nil, err
	}
	for _, k := range known {
		names = append(names, base.Named{ID: base.AllocID(k.Request.Job.AllocID, k.Key), Job: k.Request.Job.ID, Group: k.Request.Job.Group})
	}
	chosen, err := base.Selected(c, names, func(n base.Named) base.Named { return n })
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(list, func(change api.Change) bool { return !chosen.Has(who(change)) }), nil
}

func renderChanges(c *base.Command, list api.ChangeList, now time.Time) string {
	const jobWidth, whatWidth = 14, 44 // of 80 columns
	var lines []string
	day := now.Local().Format(time.DateOnly)
	row := func(at, alloc, job, what string) string {
		return strings.TrimRight(fmt.Sprintf("%-8s  %-8s  %-*s  %s", at, alloc, jobWidth, base.Clip(base.Cell(job), jobWidth, ""), what), " ")
	}
	if len(list.Changes) > 0 {
		lines = append(lines, c.Paint(base.Bold, row("TIME", "ALLOC", "JOB", "WHAT")))
	}
	for _, change := range list.Changes {
		at := change.Time.Local()
		if date := at.Format(time.DateOnly); date != day {
			lines, day = append(lines, date), date
		}
		text := base.Cell(change.What)
		if change.Kind != api.ChangeAgent {
			text = string(change.Kind) + ": " + text
		}
		parts := strings.Split(wordwrap.WrapString(text, whatWidth), "\n")
		for i, part := range parts {
			line := row("", "", "", part)
			if i == 0 {
				line = row(at.Format("15:04:05"), base.OrDash(base.Short(change.AllocID)), base.OrDash(change.Job), part)
			}
			lines = append(lines, paintChange(c, change, line))
		}
	}
	if len(list.Changes) > 0 {
		lines = append(lines, "")
	}
	of := "since " + list.Since.Local().Format(time.DateTime)
	switch len(list.Changes) {
	case 0:
		lines = append(lines, "nothing changed "+of)
	default:
		lines = append(lines, base.CountOf(len(list.Changes), "change")+" "+of)
	}
	if !list.Began.Before(list.Since) {
		lines = append(lines, fmt.Sprintf("The agent began %s ago. Of what was before, its log tells:\n  'journalctl -u weir-agent', or 'nomad alloc logs' of its job", base.Ago(now, list.Began)))
	}
	if list.Omitted > 0 {
		lines = append(lines, fmt.Sprintf("not listed: %s that gave way to later ones", base.CountOf(int(list.Omitted), "older change")))
	}
	return strings.Join(lines, "\n")
}

func paintChange(c *base.Command, change api.Change, line string) string {
	switch {
	case change.Kind == api.ChangeProblem && change.Severity == string(health.SeverityWarning):
		return c.Paint(base.Yellow, line)
	case change.Kind == api.ChangeProblem:
		return c.Paint(base.Red, line)
	case change.Kind == api.ChangeSolved:
		return c.Paint(base.Green, line)
	}
	return line
}
