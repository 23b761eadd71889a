// SPDX-License-Identifier: MPL-2.0

package loader

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/probe"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/program/filter"
	"github.com/weirmesh/weir/redirect/reconcile"
	"github.com/weirmesh/weir/redirect/store"
)

// Result says what Load did.
type Result struct {
	Changed bool             `json:"changed"`
	Did     []program.Repair `json:"did"` // one line per step, past tense
	// Problems are workloads that did not come along, each with its own. The others
	// did: a bad one is no reason to leave the node as it was.
	Problems []health.Problem `json:"problems"`
}

// left notes what did not come along.
func (r *Result) left(problems []error) {
	for _, err := range problems {
		if err != nil {
			r.Problems = append(r.Problems, health.NewProblem(health.ProblemLoadIncomplete, "restart the allocation, or run its CNI CHECK: the others came along", err.Error()))
		}
	}
}

// Load brings the node's programs and maps to this binary's version: it loads
// them where there are none, swaps programs through their links where they are
// of another version, with the rows of running workloads where the layout is
// another one too, and re-attaches what somebody detached. Connections and workloads are not disturbed, and one of them that
// cannot be brought along keeps none of the others: see Result. It refuses with
// ErrUnsupported where the kernel lacks a feature and with ErrIncompatible
// where the maps have a layout from which there is no way, see migrate.
func (d *Loader) Load() (result Result, err error) {
	err = d.Locked(func() error {
		result, err = d.LoadLocked(true)
		return err
	})
	return result, err
}

// LoadLocked is Load for a caller who holds the lock. Without renew, programs of
// another version stay: a plugin must not fight over versions with the agent.
func (d *Loader) LoadLocked(renew bool) (result Result, err error) {
	if err := d.Paths().EnsureBPFFS(); err != nil {
		return result, err
	}
	root, err := d.Paths().OpenCgroupRoot()
	if err != nil {
		return result, err
	}
	defer root.Close()
	if _, err := program.UnpinAll(d.Paths().Staging()); err != nil {
		return result, fmt.Errorf("remove unfinished load: %w", err)
	}
	// No pins is not nothing: another bpffs may be mounted over them.
	reclaimed, err := d.reclaim(root)
	if err != nil {
		return Result{Did: reclaimed}, err
	}
	pinned, err := bpfmap.OpenTables(d.Paths().Maps())
	switch {
	case errors.Is(err, bpfmap.ErrNotLoaded):
		result, err = d.LoadFresh(root)
	case errors.Is(err, bpfmap.ErrIncompatible) && renew:
		result, err = d.migrate(root)
	case err == nil:
		defer pinned.Close()
		result, err = d.loadOver(pinned, root, renew, reclaimed)
	}
	if err != nil || !result.Changed && !renew {
		return result, err
	}
	repairs, err := d.confirm(root)
	result.Changed, result.Did = result.Changed || len(repairs) > 0, append(result.Did, repairs...)
	return result, err
}

// loadOver is load where tables are there.
func (d *Loader) loadOver(pinned *bpfmap.Tables, root *os.File, renew bool, reclaimed []program.Repair) (result Result, err error) {
	repinned, err := d.repin()
	repairs := append(reclaimed, repinned...)
	if err != nil {
		return Result{Did: repairs}, err
	}
	if err := d.sign(pinned); err != nil {
		return Result{Did: repairs}, err
	}
	called, err := d.restoreCalls(pinned)
	repairs = append(repairs, called...)
	if err != nil {
		return Result{Did: repairs}, err
	}
	result, err = d.upgrade(pinned, root, renew)
	result.Changed, result.Did = result.Changed || len(repairs) > 0, append(repairs, result.Did...)
	if err != nil || len(reclaimed) == 0 && (!renew || !d.halfRestored()) {
		return result, err
	}
	// Some of it may have been on its way out already, now or when a process died
	// that had begun to put it back.
	restored, problems := d.restore(false)
	result.Did = append(result.Did, restored...)
	result.left(problems)
	return result, nil
}

// sign says in the tables whose they are, where an older version did not, or in
// another way.
func (d *Loader) sign(pinned *bpfmap.Tables) error {
	var row bpfmap.BpfControl
	if _, err := pinned.Get("control", uint32(0), &row); err != nil || row.Instance == program.InstanceOf(d.Paths()) {
		return err
	}
	row.Instance = program.InstanceOf(d.Paths())
	return pinned.Put("control", uint32(0), row, ebpf.UpdateAny)
}

// LoadFresh builds everything beside the live directory, the workloads on
// record included, and renames it into place, so that a load that dies leaves
// nothing that looks complete.
func (d *Loader) LoadFresh(root *os.File) (result Result, err error) {
	if err := probe.Probe(); err != nil {
		return result, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, program.RemoveTree(d.Paths().Staging()))
		}
	}()
	spec, err := bpfmap.LoadBpf()
	if err != nil {
		return result, fmt.Errorf("read programs: %w", err)
	}
	d.Sizes.Apply(spec)
	staging := d.Paths().Staging()
	pins, err := bpfmap.CreateMaps(spec, filepath.Join(staging, "maps"), program.InstanceOf(d.Paths()))
	defer bpfmap.CloseMaps(pins)
	if err != nil {
		return result, err
	}
	collection, err := program.NewCollection(spec, pins)
	if err != nil {
		return result, err
	}
	defer collection.Close()
	repairs, err := program.AttachAll(collection.Programs, spec.Programs, root, filepath.Join(staging, "links"))
	if err != nil {
		return result, err
	}
	filters, err := filter.LoadFilterPrograms(filepath.Join(staging, "maps"), filepath.Join(staging, "filters"))
	if err != nil {
		return result, err
	}
	filters.Close()
	// The programs are attached already: a listener that opens now is not missed.
	staged := *d
	staged.Reader = d.In(staging)
	if err := makeCalls(staged.Paths()); err != nil {
		return result, err
	}
	restored, problems := staged.restore(true)
	// What a half-removed instance left is in the way of the rename.
	if _, err := program.UnpinAll(d.Paths().PinDir); err != nil {
		return result, fmt.Errorf("remove incomplete pins: %w", err)
	}
	if err := os.Rename(staging, d.Paths().PinDir); err != nil {
		return result, fmt.Errorf("publish pins: %w", err)
	}
	repairs = append([]program.Repair{{Kind: program.MapsCreated, Object: fmt.Sprintf("%d maps in %s", len(pins), d.Paths().PinDir)}}, repairs...)
	result = Result{Changed: true, Did: append(repairs, restored...)}
	result.left(problems)
	return result, nil
}

// upgrade swaps the programs of a loaded node for this binary's where they
// differ and renew is set, and repairs links that are not in force.
func (d *Loader) upgrade(pinned *bpfmap.Tables, root *os.File, renew bool) (result Result, err error) {
	var row bpfmap.BpfControl
	if _, err := pinned.Get("control", uint32(0), &row); err != nil {
		return result, err
	}
	broken, err := program.LinkProblems(program.ProgramNames(), root, d.Paths().Links())
	if err != nil {
		return result, err
	}
	renew = renew && row.Digest != bpfmap.Digest()
	if !renew && len(broken) == 0 {
		return result, nil
	}
	spec, err := bpfmap.LoadBpf()
	if err != nil {
		return result, fmt.Errorf("read programs: %w", err)
	}
	if !renew {
		// Those that are in force may be of a newer version than this binary's.
		maps.DeleteFunc(spec.Programs, func(name string, _ *ebpf.ProgramSpec) bool { return broken[name] == "" })
	}
	pins, err := bpfmap.PinnedMaps(spec, d.Paths().Maps())
	defer bpfmap.CloseMaps(pins)
	if err != nil {
		return result, err
	}
	collection, err := program.NewCollection(spec, pins)
	if err != nil {
		return result, err
	}
	defer collection.Close()
	repairs, err := program.AttachAll(collection.Programs, spec.Programs, root, d.Paths().Links())
	result.Changed = true
	result.Did = append(result.Did, repairs...)
	if err != nil {
		return result, err
	}
	if !renew {
		return result, nil
	}
	if err := program.RenewCalls(pinned, d.Paths()); err != nil {
		return result, err
	}
	repairs, problems := d.renewLookups(pinned)
	result.Did = append(result.Did, repairs...)
	result.left(append(problems, program.RemoveTree(d.Paths().Spares()), d.RenewFilters()))
	if repairs, err = d.detachFormer(spec); err != nil {
		return result, err
	}
	result.Did = append(result.Did, repairs...)
	row.Digest = bpfmap.Digest()
	return result, pinned.Put("control", uint32(0), row, ebpf.UpdateAny)
}

// renewLookups swaps the sk_lookup program of every workload. One that it cannot
// swap goes on with the program that it has, which reads the same tables.
func (d *Loader) renewLookups(pinned *bpfmap.Tables) (repairs []program.Repair, problems []error) {
	records, err := d.Paths().ReadRecords()
	problems = append(problems, err)
	for _, r := range records {
		ns, err := inspect.OpenNamespaceOf(r)
		if errors.Is(err, host.ErrNetNSGone) {
			continue
		}
		if err == nil {
			_, err = program.AttachLookup(pinned, d.Paths(), ns, true)
			ns.Close()
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("upgrade workload %s: %w", r.Key, err))
			continue
		}
		repairs = append(repairs, program.Repair{Kind: program.Updated, Object: program.LookupName + " of " + r.Key.String()})
	}
	return repairs, problems
}

// restore puts the workloads on record back after their maps were lost, or looks
// at each of them where the maps are not new.
func (d *Loader) restore(lost bool) (repairs []program.Repair, problems []error) {
	records, unreadable := d.Paths().ReadRecords()
	problems = append(problems, unreadable)
	if len(records) == 0 {
		return nil, problems
	}
	pinned, err := bpfmap.OpenTables(d.Paths().Maps())
	if err != nil {
		return nil, append(problems, err)
	}
	defer pinned.Close()
	for some := range slices.Chunk(records, reconcile.MaxChanges) {
		restored, failed := d.restoreSome(pinned, some, lost)
		repairs, problems = append(repairs, restored...), append(problems, failed...)
	}
	return repairs, problems
}

func (d *Loader) restoreSome(pinned *bpfmap.Tables, records []*store.Record, lost bool) (repairs []program.Repair, problems []error) {
	var targets []reconcile.Target
	for _, r := range records {
		ns, err := inspect.OpenNamespaceOf(r)
		if errors.Is(err, host.ErrNetNSGone) {
			continue
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("restore workload %s: %w", r.Key, err))
			continue
		}
		defer ns.Close()
		if lost {
			r.LoseRows() // the tables are new
		}
		targets = append(targets, reconcile.Target{Record: r, NS: ns})
	}
	for i, outcome := range d.EnsureAll(pinned, targets) {
		key := targets[i].Record.Key
		if outcome.Err != nil {
			problems = append(problems, fmt.Errorf("restore workload %s: %w", key, outcome.Err))
			continue
		}
		for _, what := range outcome.Repaired {
			repairs = append(repairs, program.Repair{Kind: program.WorkloadRestored, Object: key.String() + ": " + what.String()})
		}
	}
	return repairs, problems
}
