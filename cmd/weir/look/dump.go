// SPDX-License-Identifier: MPL-2.0

package look

import (
	"errors"

	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/dump"
)

// dumped is what dump prints as JSON.
type dumped struct {
	Schema  int        `json:"schema"`
	AllocID string     `json:"alloc_id"`
	Rows    []dump.Row `json:"rows"`
}

func NewDump(env base.Env) *base.Command {
	c := base.New(env, "dump", "Print the kernel's rows of an allocation", `  Prints all that the kernel's programs look at when they decide about connections
  of an allocation: a line a row, sorted, with the table, the key and the value.
  Counters and the destinations in use are not among them. The same configuration
  gives the same text after every restart, so two dumps can be compared.

  ALLOC is the beginning of an allocation's ID, or a job that has one allocation
  on this node. See what a change in Consul made of the rows:

      $ weir dump 0b5d > before
      $ weir dump 0b5d | diff before -`).WithPaths().WithJSON().WithSelection()
	c.WithOperands(1, "ALLOC")
	c.Do = func() (int, error) {
		if c.Operand() == "" {
			return 1, errors.New("name an allocation: 'weir workloads' lists them")
		}
		datapath := c.Datapath()
		view, _, _ := c.Agent()
		record, err := workloadOf(c, datapath, view)
		if err != nil {
			return 1, err
		}
		rows, err := datapath.Dump(record.Key)
		if err != nil {
			return 1, err
		}
		if c.JSON {
			return 0, c.PrintJSON(dumped{Schema: base.Schema, AllocID: base.AllocationOf(record), Rows: rows})
		}
		lines := [][]string{{"TABLE", "KEY", "VALUE"}}
		for _, row := range rows {
			lines = append(lines, []string{row.Table, row.Key, row.Value})
		}
		c.UI.Output(base.Table("", lines))
		return 0, nil
	}
	return c
}
