// SPDX-License-Identifier: MPL-2.0

package loader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/bpfmap/layout"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/reconcile"
	"github.com/weirmesh/weir/redirect/store"
)

// mapChanges are the maps of the node whose shape is not this binary's.
type mapChanges struct {
	names []string
	old   *bpfmap.Tables // as they are pinned
	fresh *bpfmap.Tables // the new ones, and those that stay
	kept  map[string]*ebpf.Map
	all   *ebpf.CollectionSpec

	copied map[string]map[string][]byte // rows of the old maps, by map and key
}

// changedMaps compares the maps of the node with this binary's. Control is always
// among those that differ, as it tells the layout, and so are the events, whose
// map does not tell what a record is.
func (d *Loader) changedMaps(spec *ebpf.CollectionSpec) (changes *mapChanges, err error) {
	changes = &mapChanges{
		old:   &bpfmap.Tables{Dir: d.Paths().Maps(), Open: make(map[string]*ebpf.Map)},
		fresh: &bpfmap.Tables{Dir: d.Paths().Maps(), Open: make(map[string]*ebpf.Map)},
		kept:  make(map[string]*ebpf.Map), all: spec, copied: make(map[string]map[string][]byte),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, changes.Close())
		}
	}()
	for name, mapSpec := range spec.Maps {
		table, err := changes.old.Table(name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			changes.names = append(changes.names, name)
			continue
		case err != nil:
			return changes, err
		}
		same, err := layout.SameShape(mapSpec, table)
		if err != nil {
			return changes, fmt.Errorf("compare map %s: %w", name, err)
		}
		if name == "indexes" && !same {
			return changes, fmt.Errorf("migrate to layout %d: %w: map indexes differs, which connections that run need: drain the node, 'weir unload', then load this version",
				bpfmap.Layout, bpfmap.ErrIncompatible)
		}
		bpfmap.KeepSize(mapSpec, table)
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
	pins, err := bpfmap.CreateMaps(some, dir, instance)
	for name, table := range pins {
		c.fresh.Open[name] = table
	}
	return err
}

func (c *mapChanges) pins() map[string]*ebpf.Map {
	pins := make(map[string]*ebpf.Map)
	for name, table := range c.kept {
		pins[name] = table
	}
	for _, name := range c.names {
		pins[name] = c.fresh.Open[name]
	}
	return pins
}

func (c *mapChanges) describe() []program.Repair {
	return []program.Repair{{Kind: program.MapsMigrated, Object: fmt.Sprintf("layout %d: %d maps stay, %v are made anew", bpfmap.Layout, len(c.kept), c.names)}}
}

func (c *mapChanges) Close() error {
	bpfmap.CloseMaps(c.kept)
	return errors.Join(c.old.Close(), c.fresh.Close())
}

// writeRows writes what user space owns into the new maps: the rows of every
// workload on record, under the generation in force, and its listeners.
func (c *mapChanges) writeRows(paths store.Paths, records []*store.Record) error {
	c.fresh.Only = c.names
	defer func() { c.fresh.Only = nil }()
	for _, r := range records {
		ns, err := inspect.OpenNamespaceOf(r)
		if errors.Is(err, host.ErrNetNSGone) {
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

func (c *mapChanges) writeRowsOf(paths store.Paths, r *store.Record, ns *host.Namespace) error {
	generation, err := c.fresh.Generation(r.Cookie)
	if err != nil || generation == 0 {
		return err
	}
	wanted := r.Desired()
	if err := wanted.Validate(); err != nil {
		return err
	}
	if err := c.fresh.PutRows(bpfmap.EncodeRows(wanted, r.Cookie, generation, r.IPv6), r.Cookie, generation); err != nil {
		return err
	}
	if !slices.Contains(c.names, "listeners") {
		return nil
	}
	_, err = reconcile.RegisterExistingListeners(c.fresh, paths, ns, wanted, r.RejectedCgroups, nil)
	return err
}

// rowsOf are the maps whose rows are copied, those of the records too: a record
// that cannot be read may be of a workload that runs. What sockets carry with
// them cannot be copied from here.
func rowsOf(names []string) []string {
	return slices.DeleteFunc(slices.Clone(names), func(name string) bool {
		return slices.Contains([]string{"control", "events", "listeners", "binders", "dials"}, name)
	})
}

// copyRows copies what the old maps hold. What the programs learn after that is
// the next call's, for which the rows that were copied are remembered.
func (c *mapChanges) copyRows() error {
	for _, name := range rowsOf(c.names) {
		table, err := c.old.Table(name)
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
	convert, err := layout.NewConversion(table, c.all.Maps[name])
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
		key, value := convert.Key(row.key), convert.Value(row.value)
		switch {
		case known && bytes.Equal(before, row.value):
			continue
		case !known:
			if err := c.fresh.Put(name, key, value, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
				return err
			}
			continue
		case name == "verdicts":
			if err := c.addCounts(key, value, convert.Value(before)); err != nil {
				return err
			}
			continue
		case name != "proxies":
			continue // the new programs' own is newer
		}
		if err := c.fresh.Put(name, key, value, ebpf.UpdateExist); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	return nil
}

// addCounts adds to the counters of a workload what rose from before to now.
func (c *mapChanges) addCounts(key, now, before []byte) error {
	var sum bpfmap.BpfVerdictCounts
	if found, err := c.fresh.Get("verdicts", key, &sum); err != nil || !found {
		return err
	}
	for i := range sum.Count {
		at := 8 * i // the counts come first
		sum.Count[i] += binary.NativeEndian.Uint64(now[at:]) - binary.NativeEndian.Uint64(before[at:])
	}
	return c.fresh.Put("verdicts", key, sum, ebpf.UpdateExist)
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

// forgetBinders lets a proxy be learned anew once it has no listener left, where
// the notes by which the kernel counts its listeners are gone with their map.
func (c *mapChanges) forgetBinders() error {
	if !slices.Contains(c.names, "binders") {
		return nil
	}
	table, err := c.fresh.Table("proxies")
	if err != nil {
		return err
	}
	var key bpfmap.BpfProxyKey
	var proxy bpfmap.BpfProxy
	counting := make(map[bpfmap.BpfProxyKey]bpfmap.BpfProxy)
	rows := table.Iterate()
	for rows.Next(&key, &proxy) {
		if proxy.Listeners > 0 {
			counting[key] = proxy
		}
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("walk map proxies: %w", err)
	}
	for key, proxy := range counting {
		proxy.Listeners, proxy.Outbound, proxy.Flags = 0, 0, proxy.Flags|bpfmap.BpfProxyFlagPROXY_PINNED
		if err := c.fresh.Put("proxies", key, proxy, ebpf.UpdateExist); err != nil {
			return err
		}
	}
	return nil
}
