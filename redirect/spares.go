// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/program"
)

// FillSpares loads the lookup programs of the next namespaces ahead, so that their ADDs
// need not wait for the verifier, and returns how many it loaded. It takes the lock only
// to keep one. A node without programs, or with those of another layout, gets none.
func (d *Datapath) FillSpares() (filled int, err error) {
	for {
		lacks, err := program.LacksSpares(d.Paths())
		if err != nil || !lacks || d.Context.Err() != nil {
			return filled, errors.Join(err, d.Context.Err())
		}
		err = d.fillSpare()
		if errors.Is(err, bpfmap.ErrNotLoaded) || errors.Is(err, bpfmap.ErrIncompatible) {
			return filled, nil
		}
		if err != nil {
			return filled, fmt.Errorf("load programs ahead: %w", err)
		}
		filled++
	}
}

func (d *Datapath) fillSpare() error {
	tables, err := bpfmap.OpenTables(d.Paths().Maps())
	if err != nil {
		return err
	}
	prog, err := program.LoadSpare(tables)
	if err := errors.Join(err, tables.Close()); err != nil {
		return err
	}
	defer prog.Close()
	return d.Locked(func() error {
		// Those that are the node's by now.
		tables, err := bpfmap.OpenTables(d.Paths().Maps())
		if err != nil {
			return err
		}
		defer tables.Close()
		return program.PinSpare(d.Paths(), tables, prog)
	})
}
