// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/loader"
	"github.com/weirmesh/weir/redirect/monitor"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/reconcile"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// Datapath is the data path of one node. It holds no state of it but the paths, so
// any number of them, in any number of processes, may work on the same node. What it
// embeds it can do as well: read, bring a workload to its record, load and unload.
type Datapath struct {
	loader.Loader
}

// New returns the data path at paths. Nothing is opened or changed.
func New(paths store.Paths) *Datapath {
	return &Datapath{loader.Loader{Reconciler: reconcile.Of(inspect.At(paths))}}
}

// Within returns the same data path for who has other things to do than to wait
// for another process's change for longer than that.
func (d *Datapath) Within(timeout time.Duration) *Datapath {
	bounded := *d
	bounded.LockTimeout, bounded.CheckTimeout = timeout, min(timeout, d.CheckTimeout)
	return &bounded
}

// Until returns the same data path for who waits no longer than ctx lives: a change that
// waits for another process's is given up then, and one that has begun is finished.
func (d *Datapath) Until(ctx context.Context) *Datapath {
	bounded := *d
	bounded.Context = ctx
	return &bounded
}

// Sized returns the same data path, which makes tables of these sizes where there are
// none yet.
func (d *Datapath) Sized(sizes bpfmap.Sizes) *Datapath {
	sized := *d
	sized.Sizes = sizes
	return &sized
}

// Attachment asks for a namespace to be put under Weir.
type Attachment struct {
	Key     workload.AttachmentID
	NetNS   string // path of the namespace
	Request workload.Request

	// For a namespace that has no record, so that it is whole from its first moment:
	MeshConfig      *workload.MeshConfig // what is known of it in Consul already; nil: nothing
	RejectedCgroups []uint64             // known not to be the proxy's
}

// Remove takes a namespace out of Weir. It returns nil when there is nothing
// to remove, and needs neither the namespace nor loaded programs.
func (d *Datapath) Remove(key workload.AttachmentID) error {
	rest := false
	err := d.Locked(func() (err error) {
		rest, err = d.remove(key)
		return err
	})
	if err == nil && rest {
		err = d.eraseDead()
	}
	if err != nil {
		return fmt.Errorf("remove workload %s: %w", key, err)
	}
	return nil
}

// remove reports whether there may be rows of workloads that are gone: those of a large
// one, or what a call left that died half way and is made again now.
func (d *Datapath) remove(key workload.AttachmentID) (rest bool, err error) {
	r, err := d.Paths().ReadRecord(key)
	// What an unreadable record stood for goes with its namespace; see prune.
	if errors.Is(err, store.ErrUnknown) || errors.Is(err, store.ErrUnreadable) {
		return true, d.Paths().RemoveRecord(key)
	}
	if err != nil {
		return false, err
	}
	tables, err := d.OpenOrReclaim()
	// Rows of a node that is not loaded are gone; those of another version
	// belong to a namespace that is on its way out and harm nobody.
	if err != nil && !errors.Is(err, bpfmap.ErrNotLoaded) && !errors.Is(err, bpfmap.ErrIncompatible) {
		return false, err
	}
	if tables != nil {
		defer tables.Close()
	}
	if err := d.removeWorkload(tables, r); err != nil {
		return false, err
	}
	if tables != nil {
		if rest, err = tables.HasBudget(r.Cookie); err != nil {
			return false, err
		}
	}
	return rest, d.Paths().RemoveRecord(key)
}

// removeWorkload undoes ensure, as far as it gets; the record stays until all of it
// is done. tables may be nil. The rows go first: from then on the kernel
// leaves the namespace alone, outbound.
func (d *Datapath) removeWorkload(tables *bpfmap.Tables, r *store.Record) error {
	var rows error
	if tables != nil {
		var applied *workload.Workload
		if r.State == store.Complete {
			applied = &r.Applied
		}
		rows = tables.DeleteWorkload(r.Cookie, applied)
	}
	return errors.Join(rows, program.DetachLookup(d.Paths(), r.Cookie), d.RemoveRoutes(r))
}

// Check verifies that a workload is redirected as its record says, down to the
// links on the root of cgroup v2, and repairs what is not. It returns what it
// repaired, and an error only for what cannot be repaired in place: ErrUnknown
// where there is no record, ErrNetNSGone where netns is not the namespace that
// was added. netns may be empty.
func (d *Datapath) Check(key workload.AttachmentID, netns string) (repaired []program.Repair, err error) {
	err = store.LockedWithin(d.Context, d.Paths().Lock(), d.CheckTimeout, func() error {
		repaired, err = d.check(key, netns)
		return err
	})
	if err != nil {
		return repaired, fmt.Errorf("check workload %s: %w", key, err)
	}
	return repaired, nil
}

func (d *Datapath) check(key workload.AttachmentID, netns string) (repaired []program.Repair, err error) {
	r, err := d.Paths().ReadRecord(key)
	if err != nil {
		return nil, err
	}
	if netns != "" {
		r.Dirty = r.NetNS != netns
		r.NetNS = netns
	}
	ns, err := inspect.OpenNamespaceOf(r)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	loaded, err := d.LoadLocked(false)
	if err != nil {
		return nil, err
	}
	tables, err := bpfmap.OpenTables(d.Paths().Maps())
	if err != nil {
		return nil, err
	}
	defer tables.Close()
	repairs, err := d.Ensure(tables, r, ns)
	return append(loaded.Did, repairs...), err
}

// SetMeshConfig replaces what Consul adds to a workload. Open connections and
// the workload's origins stay; no change means no write.
func (d *Datapath) SetMeshConfig(key workload.AttachmentID, meshConfig workload.MeshConfig) error {
	return d.SetMeshConfigs([]reconcile.MeshChange{{Key: key, MeshConfig: meshConfig}})[0]
}

// GC removes the workloads of a CNI network that are not in valid, and
// whatever belongs to namespaces that died. Other networks' workloads with
// living namespaces are not touched.
func (d *Datapath) GC(network string, valid []workload.AttachmentID) (removed []workload.AttachmentID, err error) {
	err = d.Locked(func() error {
		records, err := d.Paths().ReadRecords()
		if err != nil && !errors.Is(err, store.ErrUnreadable) {
			return err
		}
		// One that cannot be read names no network: its workload stays.
		var problems []error
		var others []*store.Record
		for _, r := range records {
			if r.Request.Network != network || slices.Contains(valid, r.Key) {
				others = append(others, r)
				continue
			}
			if _, err := d.remove(r.Key); err != nil {
				problems = append(problems, fmt.Errorf("remove workload %s: %w", r.Key, err))
				continue
			}
			removed = append(removed, r.Key)
		}
		_, pruned := d.pruneDead(others)
		return errors.Join(append(problems, pruned)...)
	})
	return removed, errors.Join(err, d.eraseDead())
}

// Events delivers every connection of every workload from now on, until ctx ends: see
// [monitor.Read].
func (d *Datapath) Events(ctx context.Context, deliver func(monitor.Event) error) error {
	return monitor.Read(ctx, d.Paths(), deliver)
}
