// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"

	"github.com/cilium/ebpf/link"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// ensureRoutes sets the routes to the encoded ranges where they are not there.
func (d *Datapath) ensureRoutes(r, before *store.Record, ns *host.Namespace, wanted workload.Workload) (changed bool, err error) {
	if r.State == store.Complete && before.Applied.Sources.Equal(wanted.Sources) {
		if there, err := ns.HasRoutes(wanted, r.IPv6); err != nil || there {
			return false, err
		}
	}
	if err := d.markIncomplete(r); err != nil {
		return false, err
	}
	r.IPv6, err = ns.SetRoutes(wanted)
	return err == nil, err
}

// markIncomplete marks the record incomplete on disk.
func (d *Datapath) markIncomplete(r *store.Record) error {
	r.Begin()
	return d.paths.WriteRecord(r)
}

// pruneDead removes what belongs to namespaces that died: their records, and the
// rows and links that have no record at all.
func (d *Datapath) pruneDead() error {
	records, err := d.paths.ReadRecords()
	if err != nil && !errors.Is(err, store.ErrUnreadable) {
		return err
	}
	// First: without its pins, a namespace in use looks like one that died.
	tables, unopened := d.openOrReclaim()
	if unopened == nil {
		defer tables.Close()
	}
	var problems []error
	owned := make(map[uint64]bool)
	for _, r := range records {
		owned[r.Cookie] = true
		ns, err := openNamespaceOf(r)
		if err == nil {
			ns.Close()
		}
		if errors.Is(err, host.ErrNetNSGone) && !d.LookupAttached(r.Cookie) {
			problems = append(problems, d.remove(r.Key))
		}
	}
	if errors.Is(unopened, bpfmap.ErrNotLoaded) {
		return errors.Join(problems...)
	}
	if unopened != nil {
		return errors.Join(append(problems, unopened)...)
	}
	orphans, err := d.orphans(owned)
	problems = append(problems, err)
	for _, orphan := range orphans {
		if orphan.alive {
			continue
		}
		problems = append(problems, tables.DeleteWorkload(orphan.cookie, nil), program.DetachLookup(d.paths, orphan.cookie))
	}
	return errors.Join(problems...)
}

// orphan is a lookup program without a record.
type orphan struct {
	cookie uint64
	alive  bool // its namespace still exists: somebody removed the record
}

func (d *Datapath) orphans(owned map[uint64]bool) (found []orphan, err error) {
	entries, err := os.ReadDir(d.paths.Lookups())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list lookup programs: %w", err)
	}
	for _, entry := range entries {
		cookie, err := strconv.ParseUint(entry.Name(), 10, 64)
		if err != nil || owned[cookie] {
			continue
		}
		pinned, err := link.LoadPinnedLink(d.paths.Lookup(cookie), nil)
		if err != nil {
			return found, fmt.Errorf("open lookup link: %w", err)
		}
		found = append(found, orphan{cookie: cookie, alive: program.LookupInode(pinned) != 0})
		pinned.Close()
	}
	return found, nil
}

// renewFilters brings this binary's programs to every workload. One that it cannot
// reach goes on with those that it has, and the next look at it repairs that.
func (d *Datapath) renewFilters() error {
	programs, err := program.RenewFilterPrograms(d.paths)
	if err != nil {
		return err
	}
	programs.Close()
	records, err := d.paths.ReadRecords()
	if err != nil && !errors.Is(err, store.ErrUnreadable) {
		return err
	}
	problems := []error{program.RenewFamilies(d.paths)}
	for _, r := range records {
		ns, err := openNamespaceOf(r)
		if errors.Is(err, host.ErrNetNSGone) {
			continue
		}
		if err == nil {
			_, err = program.SetFilter(d.paths, ns, r.Desired())
			ns.Close()
			program.HoldFamilies(d.paths, r.Desired()) // the former version may have had none
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("upgrade workload %s: %w", r.Key, err))
		}
	}
	return errors.Join(problems...)
}
