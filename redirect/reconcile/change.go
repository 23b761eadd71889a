// SPDX-License-Identifier: MPL-2.0

package reconcile

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sync/errgroup"
)

// Ensure brings the kernel to what the record asks for and says what it had to
// change. It is the one way to a redirected namespace: ADD, CHECK, a change
// from Consul and the return of lost maps all end here, so what one of them
// makes another can finish. The record is marked incomplete before the first
// change and complete after the last.
func (d *Reconciler) Ensure(tables *bpfmap.Tables, r *store.Record, ns *host.Namespace) (changed []program.Repair, err error) {
	outcome := d.EnsureAll(tables, []Target{{Record: r, NS: ns}})[0]
	return outcome.Repaired, outcome.Err
}

// Target is a workload that is to be as its record asks for, and its namespace.
type Target struct {
	Record *store.Record
	NS     *host.Namespace
}

// Outcome is what Ensure had to change of a workload, or why it could not.
type Outcome struct {
	Repaired []program.Repair
	Err      error
}

// EnsureAll is Ensure for many workloads, each of which is named once. What goes wrong
// with one concerns it alone.
func (d *Reconciler) EnsureAll(tables *bpfmap.Tables, targets []Target) (outcomes []Outcome) {
	var changes []*change
	for _, t := range targets {
		changes = append(changes, &change{record: t.Record, ns: t.NS})
	}
	d.ensureTogether(tables, changes)
	for _, c := range changes {
		outcomes = append(outcomes, Outcome{c.did, c.err})
	}
	return outcomes
}

// change is what ensure does to one workload, in two halves. Between them every
// program ends that may still read the former rows, and one such wait, of some
// milliseconds, does for as many changes as there are.
type change struct {
	record *store.Record
	ns     *host.Namespace

	before   store.Record
	wanted   workload.Workload
	replaced bool             // new rows are in force, and others were before
	old      uint64           // the generation of those; 0: it is not known
	did      []program.Repair // what had to be changed
	marked   bool             // the record says on disk that a change has begun
	filter   chan filterSet   // gets one answer; nil: nobody began with the filter
	err      error
}

// filterSet is how setting a namespace's filter ended.
type filterSet struct {
	changed bool
	err     error
}

// beginFilter sets the filter beside all else, most of which waits for the kernel as long
// as that does: two processors need two thirds of the time. It reads no table of the node.
func (d *Reconciler) beginFilter(c *change) {
	if c.filter != nil {
		return
	}
	c.filter = make(chan filterSet, 1)
	go func() {
		d.filtering <- struct{}{} // a thread for each of many would stay
		changed, err := d.filters.Set(d.Paths(), c.ns, c.wanted)
		<-d.filtering
		c.filter <- filterSet{changed, err}
	}()
}

// mark marks the record incomplete on disk, before the first change.
func (d *Reconciler) mark(c *change) error {
	if c.marked {
		return nil
	}
	err := d.MarkIncomplete(c.record)
	c.marked = err == nil
	return err
}

// ensureTogether is EnsureAll, whose outcome is in the changes. The second halves, which
// have the verifier in them where a program is loaded, run on all processors.
func (d *Reconciler) ensureTogether(tables *bpfmap.Tables, changes []*change) {
	var replaced []*change
	for _, c := range changes {
		if c.err = d.putInForce(tables, c); c.err == nil && c.replaced {
			replaced = append(replaced, c)
		}
	}
	if len(replaced) > 0 {
		d.Wait()
		deleteFormer(tables, replaced)
	}
	var completing errgroup.Group
	completing.SetLimit(d.Processors)
	for _, c := range changes {
		if c.err == nil {
			completing.Go(func() error {
				c.err = d.complete(tables, c)
				return nil // it is nobody else's
			})
		} else if c.filter != nil {
			<-c.filter // who takes the change back must come after it
		}
	}
	_ = completing.Wait()
}

// putInForce is the first half: from its end on, connections follow the new rows.
func (d *Reconciler) putInForce(tables *bpfmap.Tables, c *change) error {
	c.before = *c.record
	moved, err := inspect.ObserveSources(c.record, c.ns)
	if err != nil {
		return err
	}
	if c.before.State == store.Complete {
		c.did = append(c.did, moved...)
	}
	c.wanted = c.record.Desired()
	if err := c.wanted.Validate(); err != nil {
		return err
	}
	if c.before.State == store.New {
		// Without rows the filter lets all through, so that it may come before them.
		if err := d.mark(c); err != nil {
			return err
		}
		d.beginFilter(c)
	}
	routed, err := d.ensureRoutes(c)
	if err != nil {
		return err
	}
	if routed {
		c.did = append(c.did, program.Repair{Kind: program.RoutesSet})
	}
	written, err := d.ensureRows(tables, c)
	if err != nil {
		return err
	}
	if written {
		c.did = append(c.did, program.Repair{Kind: program.RowsWritten})
	}
	return nil
}

// complete is the second half: all that is no row, and the record.
func (d *Reconciler) complete(tables *bpfmap.Tables, c *change) error {
	d.beginFilter(c)
	attached, err := program.AttachLookup(tables, d.Paths(), c.ns, false)
	var adopted []program.Repair
	if err == nil {
		adopted, err = RegisterExistingListeners(tables, d.Paths(), c.ns, c.wanted, c.record.RejectedCgroups, d.processes)
	}
	filtered := <-c.filter
	if err = cmp.Or(err, filtered.err); err != nil {
		return err
	}
	if attached {
		c.did = append(c.did, program.Repair{Kind: program.LookupAttached})
	}
	if filtered.changed {
		c.did = append(c.did, program.Repair{Kind: program.FilterSet})
	}
	if d.families.Hold(d.Paths(), c.wanted) {
		c.did = append(c.did, program.Repair{Kind: program.FamilyHookSet})
	}
	c.did = append(c.did, adopted...)
	if c.before.State == store.Complete && len(c.did) == 0 && !c.record.Dirty {
		return nil
	}
	c.record.Finish(c.wanted)
	return d.Paths().WriteRecord(c.record)
}

// ensureRows writes the rows where they are not those that are wanted. A change of
// link-local addresses alone is not worth a word, unless rows are missing as well.
func (d *Reconciler) ensureRows(tables *bpfmap.Tables, c *change) (told bool, err error) {
	r, before, wanted := c.record, &c.before, c.wanted
	if before.State == store.Complete && before.IPv6 == r.IPv6 && before.Applied.Equal(wanted) {
		if there, err := tables.HasRows(r.Cookie, wanted, r.IPv6); err != nil || there {
			return false, err
		}
	}
	quiet := len(c.did) == 0 && before.State == store.Complete && !slices.Equal(before.Found, r.Found)
	if quiet {
		if quiet, err = tables.HasRows(r.Cookie, before.Applied, r.IPv6); err != nil {
			return false, err
		}
	}
	if err := d.mark(c); err != nil {
		return false, err
	}
	if before.State != store.New && (before.State == store.Incomplete || !workload.SamePorts(before.Applied, wanted)) {
		// Those that wait at the new ports already, before anybody is sent there.
		// After a process that died half way nobody knows which ports are in force.
		if _, err := RegisterExistingListeners(tables, d.Paths(), c.ns, wanted, r.RejectedCgroups, d.processes); err != nil {
			return false, err
		}
	}
	if c.old, err = tables.Generation(r.Cookie); err != nil {
		return false, err
	}
	if err := tables.Admit(bpfmap.EncodeRows(before.Applied, r.Cookie, c.old, before.IPv6), bpfmap.EncodeRows(wanted, r.Cookie, c.old, r.IPv6)); err != nil {
		return false, err
	}
	if err := tables.WriteRows(r.Cookie, wanted, r.IPv6); err != nil {
		return false, err
	}
	c.replaced = before.State != store.New
	return !quiet, nil
}

// deleteFormer removes the rows that were replaced, which nobody reads any more. What
// a process that died half way left is not known in detail and is searched for.
func deleteFormer(tables *bpfmap.Tables, replaced []*change) {
	kept := make(map[uint64][]workload.ProxyPort) // by cookie
	for _, c := range replaced {
		r := c.record
		if c.before.State != store.Complete || c.old == 0 {
			c.err = tables.DeleteStale(r.Cookie, &c.wanted)
			continue
		}
		c.err = tables.DeleteRows(bpfmap.EncodeRows(c.before.Applied, r.Cookie, c.old, c.before.IPv6), r.Cookie, c.old)
		if c.err == nil && !workload.SamePorts(c.before.Applied, c.wanted) {
			kept[r.Cookie] = c.wanted.Ports()
			c.err = tables.DeleteProxies(r.Cookie, c.before.Applied.TakenProxyIDs()&^c.wanted.TakenProxyIDs())
		}
	}
	if len(kept) == 0 {
		return
	}
	err := tables.DeleteListenersBut(kept)
	for _, c := range replaced {
		if _, concerned := kept[c.record.Cookie]; concerned {
			c.err = errors.Join(c.err, err)
		}
	}
}

// MeshChange is what Consul adds to a workload from now on.
type MeshChange struct {
	Key        workload.AttachmentID
	MeshConfig workload.MeshConfig
}

// MaxChanges is how many workloads one process changes before it lets another have the
// lock: some tens of milliseconds' worth.
const MaxChanges = 64

// SetMeshConfigs is SetMeshConfig for up to MaxChanges workloads, each of which is named
// once. They wait in common, and what goes wrong with one is its error alone.
func (d *Reconciler) SetMeshConfigs(list []MeshChange) (errs []error) {
	if len(list) > MaxChanges {
		return append(d.SetMeshConfigs(list[:MaxChanges]), d.SetMeshConfigs(list[MaxChanges:])...)
	}
	errs = make([]error, len(list))
	err := d.Locked(func() error { return d.setMeshConfigs(list, errs) })
	for i, change := range list {
		if errs[i] = errors.Join(errs[i], err); errs[i] != nil {
			errs[i] = fmt.Errorf("configure workload %s: %w", change.Key, errs[i])
		}
	}
	return errs
}

func (d *Reconciler) setMeshConfigs(list []MeshChange, errs []error) error {
	tables, err := bpfmap.OpenTables(d.Paths().Maps())
	if err != nil {
		return err
	}
	defer tables.Close()
	var changes []*change
	var places []int // of each in list
	for i, wanted := range list {
		r, err := d.Paths().ReadRecord(wanted.Key)
		if err == nil {
			err = workload.Merge(r.Request, wanted.MeshConfig).Validate()
		}
		var ns *host.Namespace
		if err == nil {
			ns, err = inspect.OpenNamespaceOf(r)
		}
		if err != nil {
			errs[i] = err
			continue
		}
		defer ns.Close()
		before := r.Desired()
		r.MeshConfig = wanted.MeshConfig
		r.Seats = before.NextProxyIDs(workload.Merge(r.Request, wanted.MeshConfig))
		changes, places = append(changes, &change{record: r, ns: ns}), append(places, i)
	}
	d.ensureTogether(tables, changes)
	for i, c := range changes {
		errs[places[i]] = c.err
	}
	return nil
}
