// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// verdictsReport is what verdicts prints as JSON.
type verdictsReport struct {
	Schema    int                        `json:"schema"`
	Workloads []inspect.WorkloadVerdicts `json:"workloads"`
}

func newVerdicts(env env) *command {
	c := newCommand(env, "verdicts", "Count what was decided about connections, per workload", `  Prints for every workload, or for one allocation or the allocations of one job,
  which verdicts their connections got, how often, and what each verdict means.
  Counts start at the ADD of the workload.

  Count for the allocation whose ID begins with 0b5d:

      $ weir verdicts 0b5d`).withPaths().withJSON().withSelection()
	all := c.flags.Bool("all", false, "also print verdicts that never happened")
	c.do = func() (int, error) {
		list, err := c.datapath().Verdicts()
		if errors.Is(err, store.ErrUnreadable) {
			c.ui.Error("left out: " + err.Error())
		} else if err != nil {
			return 1, err
		}
		if list, err = selectFrom(c, list, countedBy); err != nil {
			return 1, err
		}
		if c.json {
			if list == nil {
				list = []inspect.WorkloadVerdicts{}
			}
			return 0, c.printJSON(verdictsReport{Schema: jsonSchema, Workloads: list})
		}
		c.ui.Output(c.renderVerdicts(list, *all))
		return 0, nil
	}
	return c
}

func countedBy(w inspect.WorkloadVerdicts) named {
	return named{id: allocID(w.ID, w.Key), job: w.Job, group: w.Group}
}

func (c *command) renderVerdicts(list []inspect.WorkloadVerdicts, all bool) string {
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
		title := c.paint(bold, name(counted.Job, counted.Group, counted.Key))
		if len(rows) == 1 {
			blocks = append(blocks, title+"\n  no connection yet")
			continue
		}
		blocks = append(blocks, title+"\n"+table("  ", rows))
	}
	return strings.Join(blocks, "\n\n")
}

// name is how people know a workload: job, group and the short form of its
// allocation's ID; the last alone where the request named no job.
func name(job, group string, key workload.AttachmentID) string {
	parts := []string{}
	for _, part := range []string{job, group, short(key.ContainerID)} {
		if part != "" {
			parts = append(parts, part)
		}
	}
	return strings.Join(parts, "/")
}
