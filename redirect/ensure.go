// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"

	"github.com/cilium/ebpf/link"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// ensure brings the kernel to what the record asks for and says what it had to
// change. It is the one way to a redirected namespace: ADD, CHECK, a change
// from Consul and the return of lost maps all end here, so what one of them
// makes another can finish. The record is marked incomplete before the first
// change and complete after the last.
func (d *Datapath) ensure(tables *bpfmap.Tables, r *store.Record, ns *host.Namespace) (changed []string, err error) {
	before := *r
	moved, err := observeSources(r, ns)
	if err != nil {
		return nil, err
	}
	if before.Complete {
		changed = append(changed, moved...)
	}
	wanted := r.Desired()
	if err := wanted.Validate(); err != nil {
		return nil, err
	}
	routed, err := d.ensureRoutes(r, &before, ns, wanted)
	if err != nil {
		return changed, err
	}
	if routed {
		changed = append(changed, "routes to the proxy set")
	}
	written, err := d.ensureRows(tables, r, &before, ns, wanted, len(changed) == 0)
	if err != nil {
		return changed, err
	}
	if written {
		changed = append(changed, "rows written")
	}
	attached, err := program.AttachLookup(tables, d.paths, ns, false)
	if err != nil {
		return changed, err
	}
	if attached {
		changed = append(changed, "lookup program attached")
	}
	filtered, err := program.SetFilter(d.paths, ns, wanted)
	if err != nil {
		return changed, err
	}
	if filtered {
		changed = append(changed, "filter of forwarded packets set")
	}
	adopted, err := registerExistingListeners(tables, d.paths, ns, wanted, r.RejectedCgroups)
	if err != nil {
		return changed, err
	}
	changed = append(changed, adopted...)
	if before.Complete && len(changed) == 0 && !r.Dirty {
		return nil, nil
	}
	r.Complete, r.Applied = true, wanted
	return changed, d.paths.WriteRecord(r)
}

// ensureRoutes sets the routes to the encoded ranges where they are not there.
func (d *Datapath) ensureRoutes(r, before *store.Record, ns *host.Namespace, wanted workload.Workload) (changed bool, err error) {
	if r.Complete && before.Applied.Sources.Equal(wanted.Sources) {
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

// ensureRows writes the rows where they are not those that are wanted. With quiet a
// change of link-local addresses alone is not worth a word, unless rows are missing
// as well.
func (d *Datapath) ensureRows(tables *bpfmap.Tables, r, before *store.Record, ns *host.Namespace, wanted workload.Workload, quiet bool) (told bool, err error) {
	if before.Complete && before.IPv6 == r.IPv6 && before.Applied.Equal(wanted) {
		if there, err := tables.HasRows(r.Cookie, wanted, r.IPv6); err != nil || there {
			return false, err
		}
	}
	if quiet = quiet && before.Complete && !slices.Equal(before.Found, r.Found); quiet {
		if quiet, err = tables.HasRows(r.Cookie, before.Applied, r.IPv6); err != nil {
			return false, err
		}
	}
	if err := d.markIncomplete(r); err != nil {
		return false, err
	}
	if !before.Fresh && (!before.Complete || !workload.SamePorts(before.Applied, wanted)) {
		// Those that wait at the new ports already, before anybody is sent there.
		// After a process that died half way nobody knows which ports are in force.
		if _, err := registerExistingListeners(tables, d.paths, ns, wanted, r.RejectedCgroups); err != nil {
			return false, err
		}
	}
	return !quiet, d.replaceRows(tables, r, before, wanted)
}

// markIncomplete marks the record incomplete on disk.
func (d *Datapath) markIncomplete(r *store.Record) error {
	r.Complete = false
	return d.paths.WriteRecord(r)
}

// replaceRows writes the rows of the workload and removes the previous ones
// after every program that may still read them has ended. What a process that
// died half way left is not known in detail and is searched for.
func (d *Datapath) replaceRows(tables *bpfmap.Tables, r, before *store.Record, wanted workload.Workload) error {
	old, err := tables.Generation(r.Cookie)
	if err != nil {
		return err
	}
	if err := tables.Admit(bpfmap.EncodeRows(before.Applied, r.Cookie, old, before.IPv6), bpfmap.EncodeRows(wanted, r.Cookie, old, r.IPv6)); err != nil {
		return err
	}
	if err := tables.WriteRows(r.Cookie, wanted, r.IPv6); err != nil || before.Fresh {
		return err
	}
	bpfmap.WaitForReaders()
	if !before.Complete || old == 0 {
		return tables.DeleteStale(r.Cookie, &wanted)
	}
	if err := tables.DeleteRows(bpfmap.EncodeRows(before.Applied, r.Cookie, old, before.IPv6), r.Cookie, old); err != nil {
		return err
	}
	if workload.SamePorts(before.Applied, wanted) {
		return nil
	}
	return errors.Join(
		tables.DeleteListenersOn(r.Cookie, wanted.Ports()),
		tables.DeleteProxies(r.Cookie, before.Applied.TakenProxyIDs()&^wanted.TakenProxyIDs()),
	)
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
	var problems []error
	for _, r := range records {
		ns, err := openNamespaceOf(r)
		if errors.Is(err, host.ErrNetNSGone) {
			continue
		}
		if err == nil {
			_, err = program.SetFilter(d.paths, ns, r.Desired())
			ns.Close()
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("upgrade workload %s: %w", r.Key, err))
		}
	}
	return errors.Join(problems...)
}
