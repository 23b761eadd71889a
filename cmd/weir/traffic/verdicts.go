// SPDX-License-Identifier: MPL-2.0

package traffic

import (
	"errors"
	"fmt"
	"strings"

	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/store"
)

// verdictsReport is what verdicts prints as JSON.
type verdictsReport struct {
	Schema    int                        `json:"schema"`
	Workloads []inspect.WorkloadVerdicts `json:"workloads"`
}

func NewVerdicts(env base.Env) *base.Command {
	c := base.New(env, "verdicts", "Count what was decided about connections, per workload", `  Prints for every workload, or for one allocation or the allocations of one job,
  which verdicts their connections got, how often, and what each verdict means.
  Counts start at the ADD of the workload.

  Count for the allocation whose ID begins with 0b5d:

      $ weir verdicts 0b5d`).WithPaths().WithJSON().WithSelection()
	all := c.Flags.Bool("all", false, "also print verdicts that never happened")
	c.Do = func() (int, error) {
		list, err := c.Datapath().Verdicts()
		if errors.Is(err, store.ErrUnreadable) {
			c.UI.Error("left out: " + err.Error())
		} else if err != nil {
			return 1, err
		}
		if list, err = base.SelectFrom(c, list, countedBy); err != nil {
			return 1, err
		}
		if c.JSON {
			if list == nil {
				list = []inspect.WorkloadVerdicts{}
			}
			return 0, c.PrintJSON(verdictsReport{Schema: base.Schema, Workloads: list})
		}
		c.UI.Output(renderVerdicts(c, list, *all))
		return 0, nil
	}
	return c
}

func countedBy(w inspect.WorkloadVerdicts) base.Named {
	return base.Named{ID: base.AllocID(w.ID, w.Key), Job: w.Job, Group: w.Group}
}

func renderVerdicts(c *base.Command, list []inspect.WorkloadVerdicts, all bool) string {
	if len(list) == 0 {
		return "no workloads"
	}
	var blocks []string
	for _, counted := range list {
		rows := [][]string{{"VERDICT", "COUNT", "MEANING"}}
		for _, verdict := range bpfmap.AllVerdicts() {
			count := counted.Counts[verdict.String()]
			if count == 0 && !all {
				continue
			}
			rows = append(rows, []string{verdict.String(), fmt.Sprint(count), verdict.Describe()})
		}
		if counted.EventsLost > 0 {
			lost := bpfmap.EventsLost
			rows = append(rows, []string{lost.String(), fmt.Sprint(counted.EventsLost), lost.Describe()})
		}
		title := c.Paint(base.Bold, base.WorkloadName(counted.Job, counted.Group, counted.Key))
		if len(rows) == 1 {
			blocks = append(blocks, title+"\n  no connection yet")
			continue
		}
		blocks = append(blocks, title+"\n"+base.Table("  ", base.WrapLast(rows, base.Columns-len("  "))))
	}
	return strings.Join(blocks, "\n\n")
}
