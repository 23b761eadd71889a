// SPDX-License-Identifier: MPL-2.0

package reconcile

import (
	"errors"
	"fmt"

	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/program/filter"
	"github.com/weirmesh/weir/redirect/store"
)

// ensureRoutes sets the routes to the encoded ranges where they are not there.
func (d *Reconciler) ensureRoutes(c *change) (changed bool, err error) {
	r := c.record
	if r.State == store.Complete && c.before.Applied.Sources.Equal(c.wanted.Sources) {
		if there, err := c.ns.HasRoutes(c.wanted, r.IPv6); err != nil || there {
			return false, err
		}
	}
	if err := d.mark(c); err != nil {
		return false, err
	}
	r.IPv6, err = c.ns.SetRoutes(c.wanted)
	return err == nil, err
}

// MarkIncomplete marks the record incomplete on disk.
func (d *Reconciler) MarkIncomplete(r *store.Record) error {
	r.Begin()
	return d.Paths().WriteRecord(r)
}

// RenewFilters brings this binary's programs to every workload. One that it cannot
// reach goes on with those that it has, and the next look at it repairs that.
func (d *Reconciler) RenewFilters() error {
	programs, err := filter.RenewFilterPrograms(d.Paths())
	if err != nil {
		return err
	}
	programs.Close()
	records, err := d.Paths().ReadRecords()
	if err != nil && !errors.Is(err, store.ErrUnreadable) {
		return err
	}
	problems := []error{d.families.Renew(d.Paths())}
	for _, r := range records {
		ns, err := inspect.OpenNamespaceOf(r)
		if errors.Is(err, host.ErrNetNSGone) {
			continue
		}
		if err == nil {
			_, err = d.filters.Set(d.Paths(), ns, r.Desired())
			ns.Close()
			d.families.Hold(d.Paths(), r.Desired()) // the former version may have had none
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("upgrade workload %s: %w", r.Key, err))
		}
	}
	return errors.Join(problems...)
}

// RemoveRoutes removes the routes and the filter of a workload whose namespace
// still lives.
func (d *Reconciler) RemoveRoutes(r *store.Record) error {
	ns, err := inspect.OpenNamespaceOf(r)
	if errors.Is(err, host.ErrNetNSGone) || errors.Is(err, host.ErrHostNetNS) {
		return nil
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	_, err = d.filters.Remove(ns)
	return errors.Join(err, ns.RemoveRoutes())
}
