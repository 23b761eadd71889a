// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/cilium/ebpf/link"
)

// Record is what the node's record says of a workload: who asked for what. What
// the kernel makes of it is in WorkloadStatus.
type Record struct {
	Key        AttachmentID
	NetNS      string
	Cookie     uint64
	Request    Request
	MeshConfig MeshConfig
	Complete   bool // its last ADD, CHECK or change did not stop half way
}

// Records returns every workload on record, sorted by key, without a look at the
// kernel and without the lock: a record is replaced in one step. One that
// cannot be read does not hide the others; it comes back in the error.
func (d *Datapath) Records() (list []Record, err error) {
	records, err := d.paths.readRecords()
	for _, r := range records {
		list = append(list, Record{
			Key: r.Key, NetNS: r.NetNS, Cookie: r.Cookie, Request: r.Request, MeshConfig: r.MeshConfig, Complete: r.Complete,
		})
	}
	slices.SortFunc(list, func(a, b Record) int { return strings.Compare(a.Key.String(), b.Key.String()) })
	return list, err
}

// Repair attaches again what somebody detached from the root of cgroup v2, and
// loads everything anew and restores the workloads on record where the maps
// are gone. Programs of another version stay as they are. It costs a dozen
// system calls when nothing is wrong, and says what was.
func (d *Datapath) Repair() (repairs []string, err error) {
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
func (d *Datapath) PruneDead() (removed []AttachmentID, err error) {
	err = d.locked(func() error {
		before, err := d.paths.readRecords()
		if err != nil && !errors.Is(err, ErrUnreadable) {
			return err
		}
		pruned := d.pruneDead()
		for _, r := range before {
			if _, gone := os.Lstat(d.paths.record(r.Key)); errors.Is(gone, fs.ErrNotExist) {
				removed = append(removed, r.Key)
			}
		}
		return pruned
	})
	return removed, errors.Join(err, d.eraseDead())
}

// LookupsMissing returns the workloads on record whose lookup program is not pinned
// any more. It looks at nothing else, and is for when that directory changed.
func (d *Datapath) LookupsMissing() (keys []AttachmentID, err error) {
	known, err := d.Records()
	for _, k := range known {
		if _, missing := os.Lstat(d.paths.lookup(k.Cookie)); errors.Is(missing, fs.ErrNotExist) {
			keys = append(keys, k.Key)
		}
	}
	return keys, err
}

// LookupAttached reports whether the lookup program of a namespace, which its cookie
// names, is pinned and in force: two system calls, without the lock.
func (d *Datapath) LookupAttached(cookie uint64) bool {
	pinned, err := link.LoadPinnedLink(d.paths.lookup(cookie), nil)
	if err != nil {
		return false
	}
	defer pinned.Close()
	return lookupInode(pinned) != 0
}

// Directories are where a change by somebody else can be seen: records, pinned
// maps, links and lookup programs. Not all need exist.
func (p Paths) Directories() []string {
	return []string{p.workloads(), p.maps(), p.links(), p.lookups(), p.filters()}
}
