// SPDX-License-Identifier: MPL-2.0

package bpfmap

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"reflect"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/workload"
)

// What one workload may take of the node's tables, so that none can fill one to
// the harm of another.
const (

	// RowShare is how many rows of a table a workload may have however full the
	// table is. One that asks for more is refused them while five sixths are taken:
	// the rest is kept for allocations that ask for few, and for changes, which have
	// the rows of before and those of after at once. A sixth of the smallest table of
	// a node by default is more than [workload.MaxRows].
	RowShare = 64

	alarmPercent = 80 // of a table's rows; see Status
)

// Admit reports ErrFull where a change to these rows would take what is kept for
// others. Rows that the workload has are its own.
func (m *Tables) Admit(before, fresh rows) error {
	for _, t := range []struct {
		name      string
		had, want int
	}{
		{"exclusions", len(before.exclusions), len(fresh.exclusions)},
		{"ports", len(before.ports), len(fresh.ports)},
		{"addresses", len(before.addresses), len(fresh.addresses)},
		{"cidrs", len(before.cidrs), len(fresh.cidrs)},
		{"sources", len(before.sources), len(fresh.sources)},
	} {
		if t.want <= max(t.had, RowShare) {
			continue
		}
		table, err := m.Table(t.name)
		if err != nil {
			return err
		}
		used, err := m.rowsOf(t.name)
		if err != nil {
			return err
		}
		if limit := uint64(table.MaxEntries()) / 6 * 5; used+uint64(t.want) > limit {
			return fmt.Errorf("write map %s: %w: %d of its %d rows are taken; this workload asks for %d, and while more than %d are taken none gets more than %d",
				t.name, workload.ErrFull, used, table.MaxEntries(), t.want, limit, RowShare)
		}
	}
	return nil
}

// MapInfo is one of the node's tables.
type MapInfo struct {
	Name       string `json:"name"`
	Counted    bool   `json:"counted"` // its kind has rows that can be in use or not
	Rows       uint64 `json:"rows"`    // in use
	MaxEntries uint32 `json:"max_entries"`
	Bytes      uint64 `json:"bytes"` // of kernel memory, as the kernel accounts it
}

// Percent is how full a table is.
func (i MapInfo) Percent() int { return int(i.Rows * 100 / max(uint64(i.MaxEntries), 1)) }

func (m *Tables) Infos() (infos []MapInfo, err error) {
	entries, err := os.ReadDir(m.Dir)
	if err != nil {
		return nil, fmt.Errorf("list maps: %w", err)
	}
	for _, entry := range entries {
		table, err := m.Table(entry.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue // it went meanwhile
		}
		if err != nil {
			return infos, err
		}
		info, err := table.Info()
		if err != nil {
			return infos, fmt.Errorf("read map %s: %w", entry.Name(), err)
		}
		bytes, _ := info.Memlock()
		rows, err := m.rowsOf(entry.Name())
		if err != nil {
			return infos, err
		}
		infos = append(infos, MapInfo{Name: entry.Name(), Counted: counted(table), Rows: rows, MaxEntries: info.MaxEntries, Bytes: bytes})
	}
	return infos, nil
}

// rowsOf counts the rows of a table. Origins are counted by the programs, the
// others are few enough to be walked.
func (m *Tables) rowsOf(name string) (uint64, error) {
	if name == "origins" || name == "indexes" {
		held, err := m.HeldByNode()
		return uint64(held), err
	}
	table, err := m.Table(name)
	if err != nil {
		return 0, err
	}
	switch table.Type() {
	case ebpf.Hash:
		return countBatches(name, table)
	case ebpf.LPMTrie, ebpf.SockHash:
		return countKeys(name, table)
	}
	return 0, nil
}

func counted(table *ebpf.Map) bool {
	return slices.Contains([]ebpf.MapType{ebpf.Hash, ebpf.LPMTrie, ebpf.SockHash}, table.Type())
}

func countBatches(name string, table *ebpf.Map) (rows uint64, err error) {
	size := min(batchRows, int(table.MaxEntries()))
	batch := func(bytes uint32) any {
		row := reflect.ArrayOf(int(bytes), reflect.TypeFor[byte]())
		return reflect.MakeSlice(reflect.SliceOf(row), size, size).Interface()
	}
	keys, values := batch(table.KeySize()), batch(table.ValueSize())
	var cursor ebpf.MapBatchCursor
	for {
		n, err := table.BatchLookup(&cursor, keys, values, nil)
		rows += uint64(n)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return rows, nil
		}
		if err != nil {
			return rows, fmt.Errorf("count rows of map %s: %w", name, err)
		}
	}
}

// countKeys is for tables without batches. A row that goes while it is the one
// to go on from ends the count with the first row again, so there is an end.
func countKeys(name string, table *ebpf.Map) (rows uint64, err error) {
	key, next := []byte(nil), make([]byte, table.KeySize())
	for rows < uint64(table.MaxEntries()) {
		if key == nil {
			err = table.NextKey(nil, &next)
		} else {
			err = table.NextKey(key, &next)
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return rows, nil
		}
		if err != nil {
			return rows, fmt.Errorf("count rows of map %s: %w", name, err)
		}
		key = slices.Clone(next)
		rows++
	}
	return rows, nil
}

// NearlyFull reports a table of which 'weir status' lists a problem. Origins and
// indexes are one table to an operator: they are as full as each other.
func (i MapInfo) NearlyFull() bool { return i.Percent() >= alarmPercent && i.Name != "indexes" }
