// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"time"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// Repair attaches again what somebody detached from the root of cgroup v2, and
// loads everything anew and restores the workloads on record where the maps
// are gone. Programs of another version stay as they are. It costs a dozen system calls when nothing is
// wrong, and says what was.
func (d *Datapath) Repair() (repairs []program.Repair, err error) {
	err = d.Locked(func() error {
		result, err := d.LoadLocked(false)
		repairs = result.Did
		for _, problem := range result.Problems {
			err = errors.Join(err, errors.New(problem.What))
		}
		return err
	})
	return repairs, err
}

// PruneDead removes what belongs to namespaces that died, whatever network they
// were in, and returns the workloads that it took off the record.
func (d *Datapath) PruneDead() (removed []workload.AttachmentID, err error) {
	return d.PruneDeadOf(d.NewRecordReader())
}

// PruneDeadOf is PruneDead for who reads the records time and again.
func (d *Datapath) PruneDeadOf(known *inspect.RecordReader) (removed []workload.AttachmentID, err error) {
	err = d.Locked(func() error {
		records, err := known.Cache.ReadRecords(d.Paths())
		if err != nil && !errors.Is(err, store.ErrUnreadable) {
			return err
		}
		removed, err = d.pruneDead(records)
		return err
	})
	return removed, errors.Join(err, d.eraseDead())
}

// eraseDead removes what erase left of workloads that are not under Weir any
// more. It takes the lock for a slice at a time, so that an ADD does not wait for
// the DEL of a workload with very many destinations. A process that dies half way
// leaves the rest to the next one.
func (d *Datapath) eraseDead() error {
	tables, err := bpfmap.OpenTables(d.Paths().Maps())
	if errors.Is(err, bpfmap.ErrNotLoaded) || errors.Is(err, bpfmap.ErrIncompatible) {
		return nil
	}
	if err != nil {
		return err
	}
	defer tables.Close()
	dead, err := findDead(tables)
	if err != nil || len(dead) == 0 {
		return err
	}
	cursor := bpfmap.BatchCursor[bpfmap.BpfIndexKey, bpfmap.BpfAddr]{Size: bpfmap.SliceRows}
	err = d.inSlices(func() (more bool, err error) {
		if err := dead.spare(tables); err != nil {
			return false, err
		}
		origins, indexes := make(map[uint64][]bpfmap.BpfOriginKey), make(map[uint64][]bpfmap.BpfIndexKey)
		more, err = cursor.Next(tables, "indexes", func(key bpfmap.BpfIndexKey, addr bpfmap.BpfAddr) error {
			if dead[key.Cookie] {
				origins[key.Cookie] = append(origins[key.Cookie], bpfmap.BpfOriginKey{Cookie: key.Cookie, Addr: addr})
				indexes[key.Cookie] = append(indexes[key.Cookie], key)
			}
			return nil
		})
		for cookie := range indexes {
			err = errors.Join(err, tables.DropOrigins(cookie, origins[cookie], indexes[cookie]))
		}
		return more && len(dead) > 0, err
	})
	if err != nil {
		return err
	}
	return d.Locked(func() error {
		err := dead.spare(tables)
		for cookie := range dead {
			err = errors.Join(err, tables.EraseBudget(cookie))
		}
		return err
	})
}

// deadCookies are those of workloads that are not under Weir any more.
type deadCookies map[uint64]bool

func findDead(tables *bpfmap.Tables) (deadCookies, error) {
	dead := make(deadCookies)
	err := bpfmap.Walk(tables, "budgets", func(cookie uint64, _ bpfmap.BpfBudget) error { dead[cookie] = true; return nil })
	if err != nil {
		return nil, err
	}
	err = bpfmap.Walk(tables, "workloads", func(cookie uint64, _ bpfmap.BpfWorkload) error { delete(dead, cookie); return nil })
	return dead, err
}

// spare takes those out that were added again: they go on with what is left.
func (dead deadCookies) spare(tables *bpfmap.Tables) error {
	for cookie := range dead {
		generation, err := tables.Generation(cookie)
		if err != nil {
			return err
		}
		if generation != 0 {
			delete(dead, cookie)
		}
	}
	return nil
}

// inSlices calls slice, under the lock, until there is no more to do. Between
// two calls it waits as long as the last one took, for others to get the lock.
func (d *Datapath) inSlices(slice func() (more bool, err error)) error {
	for {
		var more bool
		var took time.Duration
		err := d.Locked(func() (err error) {
			start := time.Now()
			more, err = slice()
			took = time.Since(start)
			return err
		})
		if err != nil || !more {
			return err
		}
		select {
		case <-d.Context.Done():
			return d.Context.Err()
		case <-time.After(max(took, time.Millisecond)):
		}
	}
}

// pruneDead removes what belongs to namespaces that died: their records, and the
// rows and links that have no record at all. It returns those that it took off the record.
func (d *Datapath) pruneDead(records []*store.Record) (removed []workload.AttachmentID, err error) {
	// First: without its pins, a namespace in use looks like one that died.
	tables, unopened := d.OpenOrReclaim()
	if unopened == nil {
		defer tables.Close()
	}
	var problems []error
	owned := make(map[uint64]bool)
	for _, r := range records {
		owned[r.Cookie] = true
		if d.LookupAttached(r.Cookie) {
			continue // to a namespace that lives
		}
		ns, err := inspect.OpenNamespaceOf(r)
		if err == nil {
			ns.Close()
		}
		if !errors.Is(err, host.ErrNetNSGone) {
			continue
		}
		if _, err := d.remove(r.Key); err != nil {
			problems = append(problems, err)
			continue
		}
		removed = append(removed, r.Key)
	}
	if errors.Is(unopened, bpfmap.ErrNotLoaded) {
		return removed, errors.Join(problems...)
	}
	if unopened != nil {
		return removed, errors.Join(append(problems, unopened)...)
	}
	orphans, err := d.Orphans(owned)
	problems = append(problems, err)
	for _, orphan := range orphans {
		if orphan.Alive {
			continue
		}
		problems = append(problems, tables.DeleteWorkload(orphan.Cookie, nil), program.DetachLookup(d.Paths(), orphan.Cookie))
	}
	return removed, errors.Join(problems...)
}
