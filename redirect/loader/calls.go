// SPDX-License-Identifier: MPL-2.0

package loader

import (
	"errors"
	"fmt"
	"os"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
)

// makeCalls loads the lookup program over the tables that are pinned in pins, and pins what
// leads to it there.
func makeCalls(pins store.Paths) error {
	tables, err := bpfmap.OpenTables(pins.Maps())
	if err != nil {
		return err
	}
	return errors.Join(program.MakeCalls(tables, pins.Calls()), tables.Close())
}

// publishCalls puts what leads to the lookup program over the new tables in the place of
// what no namespace calls by any more.
func (d *Loader) publishCalls(calls string) error {
	if err := program.RemoveTree(d.Paths().Calls()); err != nil {
		return err
	}
	if err := os.Rename(calls, d.Paths().Calls()); err != nil {
		return fmt.Errorf("publish the lookup program: %w", err)
	}
	return nil
}

// restoreCalls makes anew what leads to the lookup program where somebody removed its pins,
// with which it is gone, and gives each namespace that called by it a new program. On a node
// that an older version loaded nobody does, and the next ADD makes it.
func (d *Loader) restoreCalls(tables *bpfmap.Tables) (repairs []program.Repair, err error) {
	lost, err := program.LostCalls(d.Paths())
	if err != nil || len(lost) == 0 {
		return nil, err
	}
	cookies, err := program.RemakeCalls(tables, d.Paths())
	if err != nil {
		return nil, err
	}
	return []program.Repair{{Kind: program.PinPutBack, Object: fmt.Sprintf("%s, which the programs of %d namespaces call", program.DeciderName, len(cookies))}}, nil
}
