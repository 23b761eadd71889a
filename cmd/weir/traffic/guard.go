// SPDX-License-Identifier: MPL-2.0

package traffic

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
)

func NewGuard(env base.Env) *base.Command {
	c := base.New(env, "guard", "List what came in past the proxy", `  Prints what came to the allocations of this node past their proxies since the
  agent began to record: to which port, from whom, how often, when first and last.
  In audit it was let in, and it is what guard "enforce" would refuse; a line in red
  was refused. What to write into the job so that it is let in follows below.

  SOURCE is an allocation of this node, or an address. COUNT has the connections
  over TCP and the datagrams over UDP. PROTO is that of the socket that serves the
  port now, and "-" where there is none, or one of each. A datagram to an ephemeral
  port is not listed, as "enforce" lets it in, too; "weir verdicts" counts it as
  guard_ephemeral.

  The agent keeps the list, of at most 256 ports and sources an allocation, and what
  it has no room for is counted below. See what would be refused of job api:

      $ weir guard api

  With -egress it lists what left past the proxies, by task: that is what the egress
  guard, guard { egress = "enforce" }, refuses or would refuse. A connect of UDP
  counts as one, each datagram without a connect, and each socket of another kind.`).WithPaths().WithJSON().WithSelection()
	c.Flags.Lookup("verbose").Usage = "print whole names; and errors in full, with the kernel's verifier log"
	egress := c.Flags.Bool("egress", false, "list what went out past the proxy")
	c.Do = func() (int, error) {
		ctx, cancel := context.WithTimeout(c.Ctx, 10*time.Second)
		defer cancel()
		list, err := c.AskGuard(ctx, c.StateDir())
		if errors.Is(err, api.ErrNotRunning) {
			return 1, fmt.Errorf("%w: it keeps the list; next: %s", api.ErrNotRunning, base.StartAgent)
		}
		if err != nil {
			return 1, err
		}
		known, err := c.Datapath().Records()
		if err != nil && known == nil {
			return 1, err
		}
		chosen, err := base.Selected(c, known, func(k inspect.Record) base.Named {
			return base.Named{ID: base.AllocID(k.Request.Job.AllocID, k.Key), Job: k.Request.Job.ID, Group: k.Request.Job.Group}
		})
		if err != nil {
			return 1, err
		}
		list.Entries = slices.DeleteFunc(list.Entries, func(e api.GuardEntry) bool {
			return !chosen.Has(base.Named{ID: e.AllocID, Job: e.Job})
		})
		list.Egress = slices.DeleteFunc(list.Egress, func(e api.EgressEntry) bool {
			return !chosen.Has(base.Named{ID: e.AllocID, Job: e.Job})
		})
		if c.JSON {
			return 0, c.PrintJSON(list)
		}
		if *egress {
			c.UI.Output(renderEgress(c, list, time.Now()))
			return 0, nil
		}
		c.UI.Output(renderGuard(c, list, time.Now()))
		return 0, nil
	}
	return c
}

func renderGuard(c *base.Command, list api.GuardList, now time.Time) string {
	since := "since the agent began to record, " + base.Ago(now, list.Since) + " ago"
	if len(list.Entries) == 0 {
		return base.Hang("nothing came in past a proxy "+since) + incomplete(list)
	}
	rows := [][]string{{"ALLOC", "JOB", "PROTO", "PORT", "SOURCE", "COUNT", "FIRST", "LAST"}}
	for _, e := range list.Entries {
		rows = append(rows, []string{
			base.Short(e.AllocID), base.OrDash(e.Job), base.OrDash(e.Protocol), fmt.Sprint(e.Port), e.Source, fmt.Sprint(e.Count), base.Ago(now, e.First), base.Ago(now, e.Last),
		})
	}
	if !c.Verbose {
		rows = base.Cut(rows, 80, 1, 4)
	}
	lines := strings.Split(base.Table("", rows), "\n")
	for i, e := range list.Entries {
		if e.Verdict == bpfmap.RefusedGuard.String() {
			lines[i+1] = c.Paint(base.Red, lines[i+1])
		}
	}
	var remedies []string
	for _, e := range list.Entries {
		group := strings.Trim(e.Job+"/"+e.TaskGroup, "/")
		if group == "" {
			group = base.Short(e.AllocID)
		}
		if line := "  " + group + ": " + e.Remedy; !slices.Contains(remedies, line) {
			remedies = append(remedies, line)
		}
	}
	return strings.Join(lines, "\n") + "\n\nTo let it in, in the job's group:\n" + strings.Join(remedies, "\n") +
		"\n\nall of it " + since + "; FIRST and LAST are ages" + incomplete(list)
}

// incomplete tells what the list does not have.
func incomplete(list api.GuardList) string {
	var text string
	if list.Omitted > 0 {
		text += fmt.Sprintf("\nnot listed: %d that came to allocations which have 256 entries, or to a full table", list.Omitted)
	}
	if list.Lost > 0 {
		text += fmt.Sprintf("\nperhaps not listed: %d connections of any kind that the kernel could not tell of", list.Lost)
	}
	return text
}
