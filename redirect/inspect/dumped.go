// SPDX-License-Identifier: MPL-2.0

package inspect

import (
	"fmt"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/dump"
	"github.com/weirmesh/weir/redirect/workload"
)

// Dump returns the rows that are in force for a workload. It takes no lock.
func (d *Reader) Dump(key workload.AttachmentID) ([]dump.Row, error) {
	r, err := d.paths.ReadRecord(key)
	if err != nil {
		return nil, fmt.Errorf("dump %s: %w", key, err)
	}
	tables, err := bpfmap.OpenTablesToRead(d.paths.Maps())
	if err != nil {
		return nil, err
	}
	defer tables.Close()
	const tries = 4
	for range tries {
		before, err := tables.Generation(r.Cookie)
		if err != nil {
			return nil, fmt.Errorf("dump %s: %w", key, err)
		}
		if before == 0 {
			return nil, fmt.Errorf("dump %s: the kernel has no row of its namespace: run its CNI CHECK or restart the allocation", key)
		}
		list, err := dump.Rows(tables, r.Cookie, before)
		if err != nil {
			return nil, fmt.Errorf("dump %s: %w", key, err)
		}
		if after, err := tables.Generation(r.Cookie); err != nil || after == before {
			return list, err
		}
	}
	return nil, fmt.Errorf("dump %s: its rows change faster than they can be read: try again", key)
}
