// SPDX-License-Identifier: MPL-2.0

package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/probe"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
)

// A node whose maps have another layout is brought to this binary's, older or
// newer, while connections go on:
//
//  1. Maps whose shape is the same stay, with all that they hold. The others are
//     made beside the old ones and filled: rows are copied, field by field as BTF
//     names them, and what user space wrote is written again from the records,
//     under the generation in force.
//  2. The programs are swapped through their links, one by one. Each finds in its
//     maps what its predecessor found.
//  3. What the old programs counted meanwhile is added, the new pins take the
//     place of the old ones, the one of the row that tells the layout last: a
//     process that dies before leaves a node that the next Load migrates again.
//  4. The filters of the namespaces are swapped, and only then the row tells whose
//     programs these are: a process that dies before leaves a node that the next
//     Load upgrades.
//
// The map that says what an index stands for has no copy: a connection whose
// index one program gives out in one map is read by another a moment later. So
// every program has to share it, and where its shape differs there is no way
// but to drain the node.

// migrate is upgrade for a node of another layout.
func (d *Loader) migrate(root *os.File) (result Result, err error) {
	if err := probe.Probe(); err != nil {
		return result, err
	}
	spec, err := bpfmap.LoadBpf()
	if err != nil {
		return result, fmt.Errorf("read programs: %w", err)
	}
	d.Sizes.Apply(spec)
	changes, err := d.changedMaps(spec)
	if err != nil {
		return result, err
	}
	defer changes.Close()
	staging := filepath.Join(d.Paths().Staging(), "maps")
	if err := changes.create(spec, staging, program.InstanceOf(d.Paths())); err != nil {
		return result, err
	}
	if err := changes.copyRows(); err != nil {
		return result, err
	}
	records, unreadable := d.Paths().ReadRecords()
	if err := changes.writeRows(d.Paths(), records); err != nil {
		return result, err
	}
	collection, err := program.NewCollection(spec, changes.pins())
	if err != nil {
		return result, err
	}
	defer collection.Close()
	repairs, err := program.AttachAll(collection.Programs, spec.Programs, root, d.Paths().Links())
	result = Result{Changed: true, Did: append(changes.describe(), repairs...)}
	if err != nil {
		return result, err
	}
	calls := filepath.Join(d.Paths().Staging(), "calls")
	if err := program.MakeCalls(changes.fresh, calls); err != nil {
		return result, err
	}
	if repairs, err = d.swapLookups(changes.fresh, calls); err != nil {
		return result, err
	}
	result.Did = append(result.Did, repairs...)
	result.left([]error{unreadable})
	d.Wait()
	if err := errors.Join(changes.copyRows(), changes.forgetBinders()); err != nil {
		return result, err
	}
	if repairs, err = d.detachFormer(spec); err != nil {
		return result, err
	}
	result.Did = append(result.Did, repairs...)
	if err := changes.fresh.SetDigest([2]uint64{}); err != nil {
		return result, err
	}
	if err := errors.Join(d.publishCalls(calls), d.publish(staging, changes)); err != nil {
		return result, err
	}
	result.left([]error{program.RemoveTree(d.Paths().Spares())}) // they hold the old tables
	renewed := d.RenewFilters()
	repairs, problems := d.ensureAll(records)
	result.Did = append(result.Did, repairs...)
	result.left(append(problems, renewed))
	return result, changes.fresh.SetDigest(bpfmap.Digest())
}

// swapLookups swaps the sk_lookup program of every namespace that has one, on
// record or not: one that stays would read maps that nobody writes any more.
func (d *Loader) swapLookups(tables *bpfmap.Tables, calls string) (repairs []program.Repair, err error) {
	cookies, err := program.LookupCookies(d.Paths())
	if err != nil {
		return nil, err
	}
	for _, cookie := range cookies {
		if err := program.SwapLookup(tables, calls, d.Paths().Lookup(cookie), cookie); err != nil {
			return repairs, fmt.Errorf("swap lookup program of namespace %d: %w", cookie, err)
		}
		repairs = append(repairs, program.Repair{Kind: program.Updated, Object: fmt.Sprintf("%s of namespace %d", program.LookupName, cookie)})
	}
	return repairs, nil
}

// publish puts the pins of the new maps in the place of the old ones, the one
// that tells the layout last.
func (d *Loader) publish(staging string, changes *mapChanges) error {
	names := slices.DeleteFunc(slices.Clone(changes.names), func(name string) bool { return name == "control" })
	for _, name := range append(names, "control") {
		if err := os.Rename(filepath.Join(staging, name), filepath.Join(d.Paths().Maps(), name)); err != nil {
			return fmt.Errorf("publish map %s: %w", name, err)
		}
	}
	entries, err := os.ReadDir(d.Paths().Maps())
	if err != nil {
		return fmt.Errorf("list maps: %w", err)
	}
	for _, entry := range entries {
		if changes.all.Maps[entry.Name()] == nil { // of another version alone
			if err := os.Remove(filepath.Join(d.Paths().Maps(), entry.Name())); err != nil {
				return fmt.Errorf("remove map %s: %w", entry.Name(), err)
			}
		}
	}
	return program.RemoveTree(d.Paths().Staging())
}

// detachFormer ends the programs of another version that this one does not have.
func (d *Loader) detachFormer(spec *ebpf.CollectionSpec) (repairs []program.Repair, err error) {
	entries, err := os.ReadDir(d.Paths().Links())
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	for _, entry := range entries {
		if spec.Programs[entry.Name()] != nil {
			continue
		}
		pin := d.Paths().Link(entry.Name())
		if err := errors.Join(program.DetachPin(pin), os.Remove(pin)); err != nil {
			return repairs, fmt.Errorf("detach %s: %w", entry.Name(), err)
		}
		repairs = append(repairs, program.Repair{Kind: program.Detached, Object: entry.Name()})
	}
	return repairs, nil
}

// ensureAll brings every workload to what this version makes of its record.
func (d *Loader) ensureAll(records []*store.Record) (repairs []program.Repair, problems []error) {
	tables, err := bpfmap.OpenTables(d.Paths().Maps())
	if err != nil {
		return nil, []error{err}
	}
	defer tables.Close()
	for _, r := range records {
		ns, err := inspect.OpenNamespaceOf(r)
		if errors.Is(err, host.ErrNetNSGone) {
			continue
		}
		if err == nil {
			_, err = d.Ensure(tables, r, ns)
			ns.Close()
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("migrate workload %s: %w", r.Key, err))
			continue
		}
		repairs = append(repairs, program.Repair{Kind: program.WorkloadMigrated, Object: r.Key.String()})
	}
	if err := tables.CorrectTotal(); err != nil { // a version that had none counted none
		problems = append(problems, err)
	}
	return repairs, problems
}
