// SPDX-License-Identifier: MPL-2.0

package inspect

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

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

	RejectedCgroups []uint64 // known not to be the proxy's
}

// Records returns every workload on record, sorted by key, without a look at the
// kernel and without the lock: a record is replaced in one step. One that
// cannot be read does not hide the others; it comes back in the error.
func (d *Reader) Records() (list []Record, err error) { return d.NewRecordReader().Records() }

// RecordReader reads the records time and again, each file once as long as it is the
// same. It is not safe for concurrent use.
type RecordReader struct {
	paths store.Paths
	Cache store.RecordCache // of Records, for who needs all that is in the files
}

// NewRecordReader returns a reader that has read nothing yet.
func (d *Reader) NewRecordReader() *RecordReader { return &RecordReader{paths: d.paths} }

// Records is that of Datapath. What the records point to is shared with other answers.
func (r *RecordReader) Records() (list []Record, err error) {
	records, err := r.Cache.ReadRecords(r.paths)
	for _, r := range records {
		list = append(list, Record{
			Key: r.Key, NetNS: r.NetNS, Cookie: r.Cookie, Request: r.Request, MeshConfig: r.MeshConfig, Complete: r.State == store.Complete, Added: r.Added,
			RejectedCgroups: r.RejectedCgroups,
		})
	}
	slices.SortFunc(list, func(a, b Record) int { return strings.Compare(a.Key.String(), b.Key.String()) })
	return list, err
}

// LookupsMissing returns the workloads on record whose lookup program is not pinned
// any more. It looks at nothing else, and is for when that directory changed.
func (d *Reader) LookupsMissing() (keys []workload.AttachmentID, err error) {
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
func (d *Reader) LookupAttached(cookie uint64) bool {
	return program.LookupAt(d.paths.Lookup(cookie)) != 0
}
