// SPDX-License-Identifier: MPL-2.0

package reconcile

import (
	"fmt"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// Checked is what a check found.
type Checked struct {
	Key      workload.AttachmentID
	Repaired []program.Repair
	Err      error
}

// CheckSome is Check for several workloads, in one turn of the lock, for who has just
// called Repair: what all workloads share is not looked at once more, which would be
// half of the work.
func (d *Reconciler) CheckSome(keys []workload.AttachmentID) []Checked {
	checked := make([]Checked, len(keys))
	err := store.LockedWithin(d.Context, d.Paths().Lock(), d.CheckTimeout, func() error {
		tables, err := bpfmap.OpenTables(d.Paths().Maps())
		if err != nil {
			return err
		}
		defer tables.Close()
		for i, key := range keys {
			checked[i].Repaired, checked[i].Err = d.checkRows(tables, key)
		}
		return nil
	})
	for i, key := range keys {
		checked[i].Key = key
		if err != nil {
			checked[i].Err = err
		}
		if checked[i].Err != nil {
			checked[i].Err = fmt.Errorf("check workload %s: %w", key, checked[i].Err)
		}
	}
	return checked
}

func (d *Reconciler) checkRows(tables *bpfmap.Tables, key workload.AttachmentID) (repaired []program.Repair, err error) {
	r, ns, err := d.OpenWorkload(key)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	return d.Ensure(tables, r, ns)
}
