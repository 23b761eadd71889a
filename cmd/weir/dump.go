// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"

	"github.com/weirmesh/weir/redirect/dump"
)

// dumped is what dump prints as JSON.
type dumped struct {
	Schema  int        `json:"schema"`
	AllocID string     `json:"alloc_id"`
	Rows    []dump.Row `json:"rows"`
}

func newDump(env env) *command {
	c := newCommand(env, "dump", "Print the kernel's rows of an allocation", `  Prints all that the kernel's programs look at when they decide about connections
  of an allocation: a line a row, sorted, with the table, the key and the value.
  Counters and the destinations in use are not among them. The same configuration
  gives the same text after every restart, so two dumps can be compared.

  ALLOC is the beginning of an allocation's ID, or a job that has one allocation
  on this node. See what a change in Consul made of the rows:

      $ weir dump 0b5d > before
      $ weir dump 0b5d | diff before -`).withPaths().withJSON().withSelection()
	c.withOperands(1, "ALLOC")
	c.do = func() (int, error) {
		if c.operand() == "" {
			return 1, errors.New("name an allocation: 'weir workloads' lists them")
		}
		datapath := c.datapath()
		view, _, _ := c.agent()
		record, err := c.workload(datapath, view)
		if err != nil {
			return 1, err
		}
		rows, err := datapath.Dump(record.Key)
		if err != nil {
			return 1, err
		}
		if c.json {
			return 0, c.printJSON(dumped{Schema: jsonSchema, AllocID: allocationOf(record), Rows: rows})
		}
		lines := [][]string{{"TABLE", "KEY", "VALUE"}}
		for _, row := range rows {
			lines = append(lines, []string{row.Table, row.Key, row.Value})
		}
		c.ui.Output(table("", lines))
		return 0, nil
	}
	return c
}
