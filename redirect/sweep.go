// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// Record is what the node's record says of a workload: who asked for what. What
// the kernel makes of it is in WorkloadStatus.
type Record struct {
	Key        workload.AttachmentID
	NetNS      string
	Cookie     uint64
	Request    workload.Request
	MeshConfig workload.MeshConfig
	Complete   bool      // its last ADD, CHECK or change did not stop half way
	Added      time.Time // when it was put under Weir; zero: nobody knows
}

// Records returns every workload on record, sorted by key, without a look at the
// kernel and without the lock: a record is replaced in one step. One that
// cannot be read does not hide the others; it comes back in the error.
func (d *Datapath) Records() (list []Record, err error) { return d.NewRecordReader().Records() }

// RecordReader reads the records time and again, each file once as long as it is the
// same. It is not safe for concurrent use.
type RecordReader struct {
	paths store.Paths
	cache store.RecordCache
}

// NewRecordReader returns a reader that has read nothing yet.
func (d *Datapath) NewRecordReader() *RecordReader { return &RecordReader{paths: d.paths} }

// Records is that of Datapath. What the records point to is shared with other answers.
func (r *RecordReader) Records() (list []Record, err error) {
	records, err := r.cache.ReadRecords(r.paths)
	for _, r := range records {
		list = append(list, Record{
			Key: r.Key, NetNS: r.NetNS, Cookie: r.Cookie, Request: r.Request, MeshConfig: r.MeshConfig, Complete: r.State == store.Complete, Added: r.Added,
		})
	}
	slices.SortFunc(list, func(a, b Record) int { return strings.Compare(a.Key.String(), b.Key.String()) })
	return list, err
}

// Repair attaches again what somebody detached from the root of cgroup v2, and
// loads everything anew and restores the workloads on record where the maps
// are gone. Programs of another version stay as they are. It costs a dozen
// system calls when nothing is wrong, and says what was.
func (d *Datapath) Repair() (repairs []Repair, err error) {
	err = d.locked(func() error {
		result, err := d.load(false)
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
	err = d.locked(func() error {
		before, err := d.paths.ReadRecords()
		if err != nil && !errors.Is(err, store.ErrUnreadable) {
			return err
		}
		pruned := d.pruneDead()
		for _, r := range before {
			if _, gone := os.Lstat(d.paths.Record(r.Key)); errors.Is(gone, fs.ErrNotExist) {
				removed = append(removed, r.Key)
			}
		}
		return pruned
	})
	return removed, errors.Join(err, d.eraseDead())
}

// LookupsMissing returns the workloads on record whose lookup program is not pinned
// any more. It looks at nothing else, and is for when that directory changed.
func (d *Datapath) LookupsMissing() (keys []workload.AttachmentID, err error) {
	known, err := d.Records()
	for _, k := range known {
		if _, missing := os.Lstat(d.paths.Lookup(k.Cookie)); errors.Is(missing, fs.ErrNotExist) {
			keys = append(keys, k.Key)
		}
	}
	return keys, err
}

// LookupAttached reports whether the lookup program of a namespace, which its cookie
// names, is pinned and in force: three system calls, without the lock.
func (d *Datapath) LookupAttached(cookie uint64) bool {
	return program.LookupAt(d.paths.Lookup(cookie)) != 0
}

// eraseDead removes what erase left of workloads that are not under Weir any
// more. It takes the lock for a slice at a time, so that an ADD does not wait for
// the DEL of a workload with very many destinations. A process that dies half way
// leaves the rest to the next one.
func (d *Datapath) eraseDead() error {
	tables, err := bpfmap.OpenTables(d.paths.Maps())
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
	return d.locked(func() error {
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
		err := d.locked(func() (err error) {
			start := time.Now()
			more, err = slice()
			took = time.Since(start)
			return err
		})
		if err != nil || !more {
			return err
		}
		time.Sleep(max(took, time.Millisecond))
	}
}
