// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"reflect"
	"time"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/host/sysctl"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/reconcile"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sync/errgroup"
)

// Add puts a namespace under Weir: when it returns nil, every connection of
// that namespace follows the rules. It loads the programs if the node has none
// and attaches again what was detached. The same call twice is once; a known
// key with another namespace gives up the old one, or leaves it as it is where
// its path is gone and it lives on; a failed call leaves nothing behind. It
// asks nobody: neither Consul nor the agent need to run.
func (d *Datapath) Add(a Attachment) error { return d.AddAll([]Attachment{a})[0] }

// AddAll is Add for several keys, each of which is named once, in one turn of the lock.
// What goes wrong with one is its error alone. The node is looked at once for all of them,
// and they are completed on all processors.
func (d *Datapath) AddAll(list []Attachment) (errs []error) {
	all := &additions{Datapath: d, list: list, errs: make([]error, len(list))}
	for i, a := range list {
		all.errs[i] = workload.Merge(a.Request, workload.MeshConfig{}).Validate()
	}
	if len(all.begun()) > 0 {
		all.fail(d.Locked(all.add))
	}
	for i, a := range list {
		if all.errs[i] != nil {
			all.errs[i] = fmt.Errorf("add workload %s: %w", a.Key, all.errs[i])
		}
	}
	return all.errs
}

// additions are several namespaces on their way under Weir.
type additions struct {
	*Datapath
	list    []Attachment
	errs    []error           // of each; nil: it goes on
	spaces  []*host.Namespace // ... once it is open
	records []*store.Record   // ... once there is one
	fresh   []bool            // ... has nothing that a failure should leave
}

// begun are the places of those that go on.
func (all *additions) begun() (places []int) {
	for i, err := range all.errs {
		if err == nil {
			places = append(places, i)
		}
	}
	return places
}

// fail ends all that go on.
func (all *additions) fail(err error) {
	for _, i := range all.begun() {
		all.errs[i] = err
	}
}

// add does it, under the lock. An error is that of all that go on.
func (all *additions) add() error {
	all.spaces, all.records, all.fresh = make([]*host.Namespace, len(all.list)), make([]*store.Record, len(all.list)), make([]bool, len(all.list))
	for _, i := range all.begun() {
		if all.spaces[i], all.errs[i] = host.OpenNamespace(all.list[i].NetNS); all.errs[i] == nil {
			defer all.spaces[i].Close()
		}
	}
	if len(all.begun()) == 0 {
		return nil
	}
	if err := all.look(); err != nil {
		return err
	}
	tables, err := bpfmap.OpenTables(all.Paths().Maps())
	if err != nil {
		return err
	}
	defer tables.Close()
	boot, err := store.BootID()
	if err != nil {
		return err
	}
	for later := all.begun(); len(later) > 0; {
		later = all.addSome(tables, later, boot)
	}
	return nil
}

// look looks at the node, and beside that in each namespace for the rules of Consul, which
// are no workload's.
func (all *additions) look() error {
	var looking errgroup.Group
	looking.SetLimit(all.Processors)
	begun := all.begun()
	looking.Go(func() error {
		_, err := all.LoadLocked(false)
		return err
	})
	for _, i := range begun {
		looking.Go(func() error {
			all.errs[i] = all.spaces[i].RefuseConsulRules()
			return nil // it is nobody else's
		})
	}
	return looking.Wait()
}

// addSome adds those of the places that are of different namespaces. What is left is
// later's: it finds what the first one of its namespace made.
func (all *additions) addSome(tables *bpfmap.Tables, places []int, boot string) (later []int) {
	var targets []reconcile.Target
	var added []int
	taken := make(map[uint64]bool)
	for _, i := range places {
		cookie := all.spaces[i].Cookie
		if taken[cookie] {
			later = append(later, i)
			continue
		}
		taken[cookie] = true
		if all.errs[i] = all.record(tables, i, boot); all.errs[i] == nil {
			targets, added = append(targets, reconcile.Target{Record: all.records[i], NS: all.spaces[i]}), append(added, i)
		}
	}
	for at, outcome := range all.EnsureAll(tables, targets) {
		i := added[at]
		all.errs[i] = outcome.Err
		if outcome.Err != nil && all.fresh[i] {
			all.errs[i] = errors.Join(outcome.Err, all.removeWorkload(tables, all.records[i]), all.Paths().RemoveRecord(all.list[i].Key))
		}
		// A running allocation keeps the redirect that it has: taking it away
		// would open what an ADD that failed half way left closed.
	}
	return later
}

// record makes the record that an attachment asks for.
func (all *additions) record(tables *bpfmap.Tables, i int, boot string) error {
	a, ns := all.list[i], all.spaces[i]
	if err := program.RefuseOtherInstance(tables, ns); err != nil {
		return err
	}
	r, err := all.recordFor(tables, a.Key, ns.Cookie)
	if err != nil {
		return err
	}
	all.records[i] = r
	unrecorded := r.Cookie == 0 // rows that it has nevertheless are in force until the new ones are
	r.Dirty = !reflect.DeepEqual(r.Request, a.Request) || r.NetNS != a.NetNS
	r.Request, r.NetNS, r.Cookie, r.BootID = a.Request, a.NetNS, ns.Cookie, boot
	if all.fresh[i] = r.State == store.New; all.fresh[i] {
		r.Added = time.Now()
	}
	if unrecorded {
		r.RejectedCgroups = a.RejectedCgroups
		if mesh := a.MeshConfig; mesh != nil && workload.Merge(a.Request, *mesh).Validate() == nil {
			r.MeshConfig = *mesh
			r.Seats = workload.Merge(a.Request, workload.MeshConfig{}).NextProxyIDs(workload.Merge(a.Request, *mesh))
		}
	}
	if r.State == store.Incomplete {
		if err := all.removeOtherRecords(r); err != nil {
			return err
		}
	}
	return all.observePorts(r, ns)
}

// observePorts reads the range of ports that the kernel chooses from in the namespace.
func (d *Datapath) observePorts(r *store.Record, ns *host.Namespace) (err error) {
	keys := sysctl.Among(d.Paths().Workloads())
	defer func() { err = errors.Join(err, keys.Close()) }()
	r.Ephemeral, err = ns.Ephemeral(keys)
	return err
}

// pathLost reports whether a namespace is alive although the path on record does
// not lead to it any more: tasks run in it, as in that of a pause container which
// Docker restarted. They stay redirected until the last of them ends.
func (d *Datapath) pathLost(r *store.Record) bool {
	ns, err := inspect.OpenNamespaceOf(r)
	if err == nil {
		ns.Close()
	}
	return errors.Is(err, host.ErrNetNSGone) && d.LookupAttached(r.Cookie)
}

// recordFor returns the record to work on: that of the key, unless it is of another
// namespace, which is given up then, or cannot be read.
func (d *Datapath) recordFor(tables *bpfmap.Tables, key workload.AttachmentID, cookie uint64) (*store.Record, error) {
	r, err := d.Paths().ReadRecord(key)
	switch {
	case errors.Is(err, store.ErrUnknown):
		return d.newRecord(tables, key, cookie)
	case errors.Is(err, store.ErrUnreadable):
		if r, err = d.newRecord(tables, key, cookie); err != nil {
			return nil, err
		}
		return r, d.Paths().SetAside(key)
	case err != nil:
		return nil, err
	case r.Cookie == cookie:
		return r, nil
	}
	if !d.pathLost(r) {
		if err := d.removeWorkload(tables, r); err != nil {
			return nil, err
		}
	}
	return d.newRecord(tables, key, cookie)
}

// newRecord returns the record to work on where there is none for the key. A
// namespace that has rows all the same lost its record, or has one under a key
// whose DEL never came: its rows stay in force until new ones are.
func (d *Datapath) newRecord(tables *bpfmap.Tables, key workload.AttachmentID, cookie uint64) (*store.Record, error) {
	r := &store.Record{Key: key}
	generation, err := tables.Generation(cookie)
	if err == nil && generation == 0 {
		r.State = store.New
	}
	return r, err
}

// removeOtherRecords makes r the only record of its namespace: another would undo it. A
// process that dies in between leaves two, of which one is incomplete, and the
// next call for that one comes here again.
func (d *Datapath) removeOtherRecords(r *store.Record) error {
	if err := d.MarkIncomplete(r); err != nil {
		return err
	}
	records, err := d.Paths().ReadRecords()
	if err != nil && !errors.Is(err, store.ErrUnreadable) {
		return err
	}
	for _, other := range records {
		if other.Cookie == r.Cookie && other.Key != r.Key {
			if err := d.Paths().RemoveRecord(other.Key); err != nil {
				return err
			}
		}
	}
	return nil
}
