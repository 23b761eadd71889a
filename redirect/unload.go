// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
)

// Unload removes programs, maps, pins and records, and returns what it
// removed. Workloads are no longer redirected from then on. It works on what
// any version pinned, and again on what it could not finish.
func (d *Datapath) Unload() (removed []string, err error) {
	err = d.locked(func() error {
		records, err := d.paths.readRecords()
		if err != nil && !errors.Is(err, ErrUnreadable) {
			return err
		}
		if err != nil {
			removed = append(removed, err.Error())
		}
		var problems []error
		for _, r := range records {
			problems = append(problems, removeRoutes(r), d.paths.removeRecord(r.Key))
			removed = append(removed, "workload "+r.Key.String())
		}
		problems = append(problems, d.dropWorkloads())
		for _, dir := range []string{d.paths.PinDir, d.paths.staging()} {
			pins, err := unpinAll(dir)
			removed = append(removed, pins...)
			problems = append(problems, err)
		}
		detached, err := d.detachHidden()
		removed = append(removed, detached...)
		problems = append(problems, err)
		return errors.Join(append(problems, removeTree(d.paths.workloads()), removeTree(d.paths.eventsLock()))...)
	})
	return removed, err
}

// dropWorkloads makes the programs leave every namespace alone: without a record
// nobody knows the path to one, whose rules of nftables ask them until it ends.
func (d *Datapath) dropWorkloads() error {
	tables, err := openTables(d.paths.maps())
	if err != nil {
		return nil // there are none, or some that this version does not know
	}
	defer tables.Close()
	return deleteIf[uint64, bpfWorkload](tables, "workloads", func(uint64) bool { return true })
}

// detachHidden detaches what this instance has attached and no pin leads to.
func (d *Datapath) detachHidden() (repairs []string, err error) {
	root, err := d.paths.cgroupRoot()
	if err != nil {
		return nil, nil // nothing can be attached to it
	}
	defer root.Close()
	sets, err := setsAt(root)
	if err != nil {
		return nil, err
	}
	return detachPrograms(d.ownSets(sets))
}
