// SPDX-License-Identifier: MPL-2.0

package loader

import (
	"errors"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
)

// Unload removes programs, maps, pins and records, and returns what it
// removed. Workloads are no longer redirected from then on. It works on what
// any version pinned, and again on what it could not finish.
func (d *Loader) Unload() (removed []program.Removal, err error) {
	err = d.Locked(func() error {
		records, err := d.Paths().ReadRecords()
		if err != nil && !errors.Is(err, store.ErrUnreadable) {
			return err
		}
		if err != nil {
			removed = append(removed, program.Removal{Kind: program.UnreadableRecord, Object: err.Error()})
		}
		var problems []error
		for _, r := range records {
			problems = append(problems, d.RemoveRoutes(r), d.Paths().RemoveRecord(r.Key))
			removed = append(removed, program.Removal{Kind: program.WorkloadRemoved, Object: r.Key.String()})
		}
		problems = append(problems, d.dropWorkloads())
		for _, dir := range []string{d.Paths().PinDir, d.Paths().Staging()} {
			pins, err := program.UnpinAll(dir)
			removed = append(removed, pins...)
			problems = append(problems, err)
		}
		detached, err := d.detachHidden()
		for _, what := range detached {
			removed = append(removed, program.Removal{Kind: program.ProgramDetached, Object: what.String()})
		}
		problems = append(problems, err)
		return errors.Join(append(problems, program.RemoveTree(d.Paths().Workloads()), program.RemoveTree(d.Paths().EventsLock()))...)
	})
	return removed, err
}

// dropWorkloads makes the programs leave every namespace alone: without a record
// nobody knows the path to one, whose rules of nftables ask them until it ends.
func (d *Loader) dropWorkloads() error {
	tables, err := bpfmap.OpenTables(d.Paths().Maps())
	if err != nil {
		return nil // there are none, or some that this version does not know
	}
	defer tables.Close()
	return bpfmap.DeleteIf[uint64, bpfmap.BpfWorkload](tables, "workloads", func(uint64) bool { return true })
}

// detachHidden detaches what this instance has attached and no pin leads to.
func (d *Loader) detachHidden() (repairs []program.Repair, err error) {
	root, err := d.Paths().OpenCgroupRoot()
	if err != nil {
		return nil, nil // nothing can be attached to it
	}
	defer root.Close()
	sets, err := program.SetsAt(root)
	if err != nil {
		return nil, err
	}
	return program.DetachPrograms(d.OwnSets(sets))
}
