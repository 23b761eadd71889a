// SPDX-License-Identifier: MPL-2.0

package bpfmap

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap/call"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// Layout numbers the structs in bpf/maps.h and bpf/config.h. It changes whenever one of them
// does; a node that runs another layout is refused, not guessed at.
const Layout = 7

// Tables is the node's tables, opened from their pins as they are needed. A pin
// has the name of its map.
type Tables struct {
	Dir  string
	Open map[string]*ebpf.Map

	readOnly bool     // for who only looks: on a read-only bpffs nothing else can be had
	Only     []string // the maps that are written, the others stay as they are; nil: all

	alone     sync.Mutex // see Alone
	opening   sync.Mutex // several goroutines may read
	ids       map[string]ebpf.MapID
	listeners map[BpfListenerKey]map[uint16]uint64 // see RememberListeners
}

// OpenTables opens the tables of a loaded node, or returns ErrNotLoaded or
// ErrIncompatible.
func OpenTables(dir string) (*Tables, error) { return openTablesFor(dir, false) }

// OpenTablesToRead is OpenTables for who writes nothing.
func OpenTablesToRead(dir string) (*Tables, error) { return openTablesFor(dir, true) }

func openTablesFor(dir string, readOnly bool) (*Tables, error) {
	m := &Tables{Dir: dir, Open: make(map[string]*ebpf.Map), readOnly: readOnly}
	var row BpfControl
	table, err := m.Table("control")
	if err == nil {
		err = table.Lookup(uint32(0), &row)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = fmt.Errorf("open %s: %w: run 'weir load'", dir, ErrNotLoaded)
	case err != nil && table != nil, err == nil && row.Layout != Layout:
		err = fmt.Errorf("open %s: %w (layout %d, this binary has %d): run 'weir load' with the version that the node should run",
			dir, ErrIncompatible, row.Layout, Layout)
	}
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

func (m *Tables) Table(name string) (*ebpf.Map, error) {
	m.opening.Lock()
	defer m.opening.Unlock()
	if table := m.Open[name]; table != nil {
		return table, nil
	}
	table, err := ebpf.LoadPinnedMap(filepath.Join(m.Dir, name), &ebpf.LoadPinOptions{ReadOnly: m.readOnly})
	if err != nil {
		return nil, fmt.Errorf("open map %s: %w", filepath.Join(m.Dir, name), err)
	}
	m.Open[name] = table
	return table, nil
}

// Alone runs action while no other goroutine that has these tables runs one so.
func (m *Tables) Alone(action func() error) error {
	m.alone.Lock()
	defer m.alone.Unlock()
	return action()
}

// ID is that of a table.
func (m *Tables) ID(name string) (ebpf.MapID, error) {
	m.opening.Lock()
	defer m.opening.Unlock()
	if id, known := m.ids[name]; known {
		return id, nil
	}
	var fd int
	if table := m.Open[name]; table != nil {
		fd = table.FD()
	} else {
		// Many are opened for this alone. The library reads all that is known of a map.
		pin, err := call.OpenPin(filepath.Join(m.Dir, name), unix.BPF_F_RDONLY)
		if err != nil {
			return 0, fmt.Errorf("open map %s: %w", name, err)
		}
		defer unix.Close(pin)
		fd = pin
	}
	var info call.MapInfo
	if err := call.ObjectInfo(fd, &info); err != nil {
		return 0, fmt.Errorf("read map %s: %w", name, err)
	}
	id := ebpf.MapID(info.ID)
	if m.ids == nil {
		m.ids = make(map[string]ebpf.MapID)
	}
	m.ids[name] = id
	return id, nil
}

func (m *Tables) Close() error {
	var problems []error
	for _, table := range m.Open {
		problems = append(problems, table.Close())
	}
	m.Open = nil
	return errors.Join(problems...)
}

func (m *Tables) Put(name string, key, value any, flags ebpf.MapUpdateFlags) error {
	if m.Only != nil && !slices.Contains(m.Only, name) {
		return nil
	}
	table, err := m.Table(name)
	if err != nil {
		return err
	}
	err = table.Update(key, value, flags)
	switch {
	case errors.Is(err, unix.E2BIG), errors.Is(err, unix.ENOSPC): // a hash, a trie
		return fmt.Errorf("write map %s: %w: it has %d rows", name, workload.ErrFull, table.MaxEntries())
	case err != nil:
		return fmt.Errorf("write map %s: %w", name, err)
	}
	return nil
}

// Get reports whether the row exists.
func (m *Tables) Get(name string, key, value any) (bool, error) {
	table, err := m.Table(name)
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

// Delete deletes a row; one that is gone already is no error.
func (m *Tables) Delete(name string, key any) error {
	table, err := m.Table(name)
	if err != nil {
		return err
	}
	if err := table.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete from map %s: %w", name, err)
	}
	return nil
}

// Digest names the objects in this binary.
func Digest() [2]uint64 {
	sum := sha256.Sum256(slices.Concat(_BpfBytes, _LookupBytes, _FilterBytes, _FamilyBytes))
	return [2]uint64{binary.NativeEndian.Uint64(sum[:]), binary.NativeEndian.Uint64(sum[8:])}
}

// CreateMaps makes and pins all tables in dir, which is not the live one.
func CreateMaps(spec *ebpf.CollectionSpec, dir string, instance uint32) (map[string]*ebpf.Map, error) {
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
	row := BpfControl{Layout: Layout, Instance: instance, Digest: Digest()}
	if err := pins["control"].Put(uint32(0), &row); err != nil {
		return pins, fmt.Errorf("write map control: %w", err)
	}
	return pins, nil
}

// PinnedMaps opens every table of the specification and compares its shape. Its size
// is the one with which it was made.
func PinnedMaps(spec *ebpf.CollectionSpec, dir string) (map[string]*ebpf.Map, error) {
	pins := make(map[string]*ebpf.Map)
	for name, mapSpec := range spec.Maps {
		table, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), nil)
		if err != nil {
			return pins, fmt.Errorf("open map %s: %w", name, err)
		}
		pins[name] = table
		mapSpec.MaxEntries = table.MaxEntries()
		if err := mapSpec.Compatible(table); err != nil {
			return pins, fmt.Errorf("open map %s: %w: %w", name, ErrIncompatible, err)
		}
	}
	return pins, nil
}

func CloseMaps(pins map[string]*ebpf.Map) {
	for _, table := range pins {
		table.Close()
	}
}

// MapNames are the node's tables, each pinned under its name.
func MapNames() []string {
	return []string{
		"addresses", "binders", "budgets", "cidrs", "configs", "control", "dials", "events", "exclusions", "flows",
		"index_totals", "indexes", "listeners", "origins", "ports", "proxies", "releases", "sources", "verdicts", "workloads",
	}
}

// ErrNotLoaded: the node has no programs and maps yet.
var ErrNotLoaded = errors.New("data path is not loaded")

// ErrIncompatible: the node's maps have another layout than this binary.
var ErrIncompatible = errors.New("data path of another version is loaded")
