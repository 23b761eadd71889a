// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
)

// A node whose maps have another layout is brought to this binary's, older or
// newer, while connections go on:
//
//  1. Maps whose shape is the same stay, with all that they hold. The others are
//     made beside the old ones and filled: what the programs learned is copied,
//     field by field as BTF names them, what user space wrote is written again
//     from the records, under the generation in force.
//  2. The programs are swapped through their links, one by one. Each finds in its
//     maps what its predecessor found.
//  3. What the old programs counted meanwhile is added, the new pins take the
//     place of the old ones, and the row that tells the layout is written last: a
//     process that dies before leaves a node that the next Load migrates again.
//
// The map that says what an index stands for has no copy: a connection whose
// index one program gives out in one map is read by another a moment later. So
// every program has to share it, and where its shape differs there is no way
// but to drain the node.

// migrate is upgrade for a node of another layout.
func (d *Datapath) migrate(root *os.File) (result LoadResult, err error) {
	if err := Probe(); err != nil {
		return result, err
	}
	spec, err := loadBpf()
	if err != nil {
		return result, fmt.Errorf("read programs: %w", err)
	}
	changes, err := d.changedMaps(spec)
	if err != nil {
		return result, err
	}
	defer changes.Close()
	staging := filepath.Join(d.paths.staging(), "maps")
	if err := changes.create(spec, staging, d.paths.instance()); err != nil {
		return result, err
	}
	if err := changes.copyRows(); err != nil {
		return result, err
	}
	records, unreadable := d.paths.readRecords()
	if err := changes.writeRows(d.paths, records); err != nil {
		return result, err
	}
	collection, err := newCollection(spec, changes.pins())
	if err != nil {
		return result, err
	}
	defer collection.Close()
	did, err := attachAll(collection.Programs, spec.Programs, root, d.paths.links())
	result = LoadResult{Changed: true, Did: append(changes.describe(), did...)}
	if err != nil {
		return result, err
	}
	did, problems := d.renewLookups(changes.fresh)
	result.Did = append(result.Did, did...)
	result.left(append(problems, unreadable))
	waitForReaders()
	if err := changes.copyRows(); err != nil {
		return result, err
	}
	if did, err = d.detachFormer(spec); err != nil {
		return result, err
	}
	result.Did = append(result.Did, did...)
	if err := d.publish(staging, changes); err != nil {
		return result, err
	}
	did, problems = d.ensureAll(records)
	result.Did = append(result.Did, did...)
	result.left(problems)
	return result, nil
}

// publish puts the pins of the new maps in the place of the old ones, the one
// that tells the layout last.
func (d *Datapath) publish(staging string, changes *mapChanges) error {
	names := slices.DeleteFunc(slices.Clone(changes.names), func(name string) bool { return name == "control" })
	for _, name := range append(names, "control") {
		if err := os.Rename(filepath.Join(staging, name), filepath.Join(d.paths.maps(), name)); err != nil {
			return fmt.Errorf("publish map %s: %w", name, err)
		}
	}
	return removeTree(d.paths.staging())
}

// detachFormer ends the programs of another version that this one does not have.
func (d *Datapath) detachFormer(spec *ebpf.CollectionSpec) (did []string, err error) {
	entries, err := os.ReadDir(d.paths.links())
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	for _, entry := range entries {
		if spec.Programs[entry.Name()] != nil {
			continue
		}
		pin := d.paths.link(entry.Name())
		if err := errors.Join(detachPin(pin), os.Remove(pin)); err != nil {
			return did, fmt.Errorf("detach %s: %w", entry.Name(), err)
		}
		did = append(did, "detached "+entry.Name())
	}
	return did, nil
}

// ensureAll brings every workload to what this version makes of its record.
func (d *Datapath) ensureAll(records []*record) (did []string, problems []error) {
	tables, err := openTables(d.paths.maps())
	if err != nil {
		return nil, []error{err}
	}
	defer tables.Close()
	for _, r := range records {
		ns, err := r.open()
		if errors.Is(err, ErrNetNSGone) {
			continue
		}
		if err == nil {
			_, err = d.ensure(tables, r, ns)
			ns.Close()
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("migrate workload %s: %w", r.Key, err))
			continue
		}
		did = append(did, "migrated "+r.Key.String())
	}
	return did, problems
}

// mapChanges are the maps of the node whose shape is not this binary's.
type mapChanges struct {
	names []string
	old   *tables // as they are pinned
	fresh *tables // the new ones, and those that stay
	kept  map[string]*ebpf.Map
	all   *ebpf.CollectionSpec

	copied map[string]map[string][]byte // rows of the old maps, by map and key
}

// changedMaps compares the maps of the node with this binary's. Control is always
// among those that differ, as it tells the layout, and so are the events, whose
// map does not tell what a record is.
func (d *Datapath) changedMaps(spec *ebpf.CollectionSpec) (changes *mapChanges, err error) {
	changes = &mapChanges{
		old:   &tables{dir: d.paths.maps(), open: make(map[string]*ebpf.Map)},
		fresh: &tables{dir: d.paths.maps(), open: make(map[string]*ebpf.Map)},
		kept:  make(map[string]*ebpf.Map), all: spec, copied: make(map[string]map[string][]byte),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, changes.Close())
		}
	}()
	for name, mapSpec := range spec.Maps {
		table, err := changes.old.table(name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			changes.names = append(changes.names, name)
			continue
		case err != nil:
			return changes, err
		}
		same, err := sameShape(mapSpec, table)
		if err != nil {
			return changes, fmt.Errorf("compare map %s: %w", name, err)
		}
		if name == "indexes" {
			if !same {
				return changes, fmt.Errorf("migrate to layout %d: %w: map indexes differs, which connections that run need: drain the node, 'weir unload', then load this version",
					layout, ErrIncompatible)
			}
			mapSpec.MaxEntries = table.MaxEntries()
		}
		if !same || name == "control" || name == "events" || table.MaxEntries() != mapSpec.MaxEntries {
			changes.names = append(changes.names, name)
			continue
		}
		if changes.kept[name], err = table.Clone(); err != nil {
			return changes, fmt.Errorf("open map %s: %w", name, err)
		}
	}
	slices.Sort(changes.names)
	return changes, nil
}

// create makes the new maps and pins them in dir.
func (c *mapChanges) create(spec *ebpf.CollectionSpec, dir string, instance uint32) error {
	some := &ebpf.CollectionSpec{Maps: make(map[string]*ebpf.MapSpec)}
	for _, name := range c.names {
		some.Maps[name] = spec.Maps[name]
	}
	pins, err := createMaps(some, dir, instance)
	for name, table := range pins {
		c.fresh.open[name] = table
	}
	return err
}

func (c *mapChanges) pins() map[string]*ebpf.Map {
	pins := make(map[string]*ebpf.Map)
	for name, table := range c.kept {
		pins[name] = table
	}
	for _, name := range c.names {
		pins[name] = c.fresh.open[name]
	}
	return pins
}

func (c *mapChanges) describe() []string {
	return []string{fmt.Sprintf("migrated to layout %d: %d maps stay, %v are made anew", layout, len(c.kept), c.names)}
}

func (c *mapChanges) Close() error {
	closeMaps(c.kept)
	return errors.Join(c.old.Close(), c.fresh.Close())
}

// writeRows writes what user space owns into the new maps: the rows of every
// workload on record, under the generation in force, and its listeners.
func (c *mapChanges) writeRows(paths Paths, records []*record) error {
	c.fresh.only = c.names
	defer func() { c.fresh.only = nil }()
	for _, r := range records {
		ns, err := r.open()
		if errors.Is(err, ErrNetNSGone) {
			continue
		}
		if err != nil {
			return err
		}
		err = c.writeRowsOf(paths, r, ns)
		ns.Close()
		if err != nil {
			return fmt.Errorf("migrate workload %s: %w", r.Key, err)
		}
	}
	return nil
}

func (c *mapChanges) writeRowsOf(paths Paths, r *record, ns *namespace) error {
	generation, err := c.fresh.generation(r.Cookie)
	if err != nil || generation == 0 {
		return err
	}
	workload := r.desired()
	if err := workload.Validate(); err != nil {
		return err
	}
	if err := c.fresh.putRows(encodeRows(workload, r.Cookie, generation, r.IPv6), r.Cookie, generation); err != nil {
		return err
	}
	if !slices.Contains(c.names, "listeners") {
		return nil
	}
	_, err = adopt(c.fresh, paths, ns, workload, r.Strangers)
	return err
}

// learned are the maps that the programs write: their rows are copied. The
// others of the kind need none: a socket's own notes go with the socket.
func learned() []string {
	return []string{"workloads", "proxies", "origins", "budgets", "releases", "verdicts", "flows"}
}

// copyRows copies what the programs learned. What they learn after that is the
// next call's, for which the rows that were copied are remembered.
func (c *mapChanges) copyRows() error {
	for _, name := range learned() {
		if !slices.Contains(c.names, name) {
			continue
		}
		table, err := c.old.table(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // this version's first
		}
		if err != nil {
			return err
		}
		if err := c.copyMap(name, table); err != nil {
			return fmt.Errorf("migrate map %s: %w", name, err)
		}
	}
	return nil
}

func (c *mapChanges) copyMap(name string, table *ebpf.Map) error {
	convert, err := newConversion(table, c.all.Maps[name])
	if err != nil {
		return err
	}
	rows, err := readRaw(table)
	if err != nil {
		return err
	}
	copied, again := c.copied[name]
	if !again {
		copied = make(map[string][]byte)
		c.copied[name] = copied
	}
	for _, row := range rows {
		before, known := copied[string(row.key)]
		copied[string(row.key)] = row.value
		key, value := convert.key(row.key), convert.value(row.value)
		switch {
		case known && bytes.Equal(before, row.value):
			continue
		case !known:
			if err := c.fresh.put(name, key, value, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
				return err
			}
			continue
		case name == "verdicts":
			if err := c.addCounts(key, value, convert.value(before)); err != nil {
				return err
			}
			continue
		case name != "proxies":
			continue // the new programs' own is newer
		}
		if err := c.fresh.put(name, key, value, ebpf.UpdateExist); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	return nil
}

// addCounts adds to the counters of a workload what rose from before to now.
func (c *mapChanges) addCounts(key, now, before []byte) error {
	var sum bpfVerdictCounts
	if found, err := c.fresh.get("verdicts", key, &sum); err != nil || !found {
		return err
	}
	for i := range sum.Count {
		at := 8 * i // the counts come first
		sum.Count[i] += binary.NativeEndian.Uint64(now[at:]) - binary.NativeEndian.Uint64(before[at:])
	}
	return c.fresh.put("verdicts", key, sum, ebpf.UpdateExist)
}

type rawRow struct{ key, value []byte }

func readRaw(table *ebpf.Map) (rows []rawRow, err error) {
	var key, value []byte
	iterator := table.Iterate()
	for iterator.Next(&key, &value) {
		rows = append(rows, rawRow{slices.Clone(key), slices.Clone(value)})
	}
	return rows, iterator.Err()
}
