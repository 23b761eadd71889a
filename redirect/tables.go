// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// layout numbers the structs in ../bpf/maps.h. It changes whenever one of them
// does; a node that runs another layout is refused, not guessed at.
const layout = 5

// tables is the node's tables, opened from their pins as they are needed. A pin
// has the name of its map.
type tables struct {
	dir  string
	open map[string]*ebpf.Map

	readOnly  bool                              // for who only looks: on a read-only bpffs nothing else can be had
	preloaded func(cookie uint64) *ebpf.Program // gives a lookup program that is loaded already, or nil; may be nil
	only      []string                          // the maps that are written, the others stay as they are; nil: all
}

// openTables opens the tables of a loaded node, or returns ErrNotLoaded or
// ErrIncompatible.
func openTables(dir string) (*tables, error) { return openTablesFor(dir, false) }

// openTablesToRead is openTables for who writes nothing.
func openTablesToRead(dir string) (*tables, error) { return openTablesFor(dir, true) }

func openTablesFor(dir string, readOnly bool) (*tables, error) {
	m := &tables{dir: dir, open: make(map[string]*ebpf.Map), readOnly: readOnly}
	var row bpfControl
	table, err := m.table("control")
	if err == nil {
		err = table.Lookup(uint32(0), &row)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = fmt.Errorf("open %s: %w: run 'weir load'", dir, ErrNotLoaded)
	case err != nil && table != nil, err == nil && row.Layout != layout:
		err = fmt.Errorf("open %s: %w (layout %d, this binary has %d): run 'weir load' with the version that the node should run",
			dir, ErrIncompatible, row.Layout, layout)
	}
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

func (m *tables) table(name string) (*ebpf.Map, error) {
	if table := m.open[name]; table != nil {
		return table, nil
	}
	table, err := ebpf.LoadPinnedMap(filepath.Join(m.dir, name), &ebpf.LoadPinOptions{ReadOnly: m.readOnly})
	if err != nil {
		return nil, fmt.Errorf("open map %s: %w", filepath.Join(m.dir, name), err)
	}
	m.open[name] = table
	return table, nil
}

func (m *tables) Close() error {
	var problems []error
	for _, table := range m.open {
		problems = append(problems, table.Close())
	}
	m.open = nil
	return errors.Join(problems...)
}

func (m *tables) put(name string, key, value any, flags ebpf.MapUpdateFlags) error {
	if m.only != nil && !slices.Contains(m.only, name) {
		return nil
	}
	table, err := m.table(name)
	if err != nil {
		return err
	}
	err = table.Update(key, value, flags)
	switch {
	case errors.Is(err, unix.E2BIG), errors.Is(err, unix.ENOSPC): // a hash, a trie
		return fmt.Errorf("write map %s: %w: it has %d rows", name, ErrFull, table.MaxEntries())
	case err != nil:
		return fmt.Errorf("write map %s: %w", name, err)
	}
	return nil
}

// get reports whether the row exists.
func (m *tables) get(name string, key, value any) (bool, error) {
	table, err := m.table(name)
	if err != nil {
		return false, err
	}
	err = table.Lookup(key, value)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read map %s: %w", name, err)
	}
	return true, nil
}

// delete deletes a row; one that is gone already is no error.
func (m *tables) delete(name string, key any) error {
	table, err := m.table(name)
	if err != nil {
		return err
	}
	if err := table.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete from map %s: %w", name, err)
	}
	return nil
}

// digest names the objects in this binary.
func digest() [2]uint64 {
	sum := sha256.Sum256(slices.Concat(_BpfBytes, _LookupBytes, _FilterBytes))
	return [2]uint64{binary.NativeEndian.Uint64(sum[:]), binary.NativeEndian.Uint64(sum[8:])}
}

// createMaps makes and pins all tables in dir, which is not the live one.
func createMaps(spec *ebpf.CollectionSpec, dir string, instance uint32) (map[string]*ebpf.Map, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create pin directory: %w", err)
	}
	pins := make(map[string]*ebpf.Map)
	for name, mapSpec := range spec.Maps {
		table, err := ebpf.NewMap(mapSpec)
		if err == nil {
			pins[name] = table
			err = table.Pin(filepath.Join(dir, name))
		}
		if err != nil {
			return pins, fmt.Errorf("create map %s: %w", name, err)
		}
	}
	row := bpfControl{Layout: layout, Instance: instance, Digest: digest()}
	if err := pins["control"].Put(uint32(0), &row); err != nil {
		return pins, fmt.Errorf("write map control: %w", err)
	}
	return pins, nil
}

// pinnedMaps opens every table of the specification and compares its shape.
func pinnedMaps(spec *ebpf.CollectionSpec, dir string) (map[string]*ebpf.Map, error) {
	pins := make(map[string]*ebpf.Map)
	for name, mapSpec := range spec.Maps {
		table, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), nil)
		if err != nil {
			return pins, fmt.Errorf("open map %s: %w", name, err)
		}
		pins[name] = table
		if err := mapSpec.Compatible(table); err != nil {
			return pins, fmt.Errorf("open map %s: %w: %v", name, ErrIncompatible, err)
		}
	}
	return pins, nil
}

func closeMaps(pins map[string]*ebpf.Map) {
	for _, table := range pins {
		table.Close()
	}
}

// mapNames are the node's tables, each pinned under its name.
func mapNames() []string {
	return []string{
		"addresses", "binders", "budgets", "cidrs", "configs", "control", "dials", "events", "exclusions", "flows",
		"index_totals", "indexes", "listeners", "origins", "ports", "proxies", "releases", "sources", "verdicts", "workloads",
	}
}
