// SPDX-License-Identifier: MPL-2.0

package bpfmap

import (
	"cmp"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// BatchCursor is a place in a hash table that is read in batches (Linux 5.6).
// Rows that come or go meanwhile may be seen or not; all others are seen once.
type BatchCursor[K, V any] struct {
	Size   int // of a batch; 0: batchRows
	cursor ebpf.MapBatchCursor
	keys   []K
	values []V
}

// batchRows is how many rows are read at once.
const batchRows = 4096

// Next visits one more batch and reports whether there may be another.
func (b *BatchCursor[K, V]) Next(tables *Tables, name string, visit func(K, V) error) (more bool, err error) {
	table, err := tables.Table(name)
	if err != nil {
		return false, err
	}
	if b.keys == nil {
		size := min(cmp.Or(b.Size, batchRows), int(table.MaxEntries()))
		b.keys, b.values = make([]K, size), make([]V, size)
	}
	n, err := table.BatchLookup(&b.cursor, b.keys, b.values, nil)
	end := errors.Is(err, ebpf.ErrKeyNotExist)
	if err != nil && !end {
		return false, fmt.Errorf("walk map %s: %w", name, err)
	}
	for i := range n {
		if err := visit(b.keys[i], b.values[i]); err != nil {
			return false, err
		}
	}
	return !end, nil
}

// Walk visits every row of a hash table.
func Walk[K, V any](tables *Tables, name string, visit func(K, V) error) error {
	var cursor BatchCursor[K, V]
	for {
		if more, err := cursor.Next(tables, name, visit); err != nil || !more {
			return err
		}
	}
}

// DeleteIf walks a whole table and deletes what matches. Only the ways back from
// damage need it: it costs as much as the table is large.
func DeleteIf[K, V any](m *Tables, name string, match func(K) bool) error {
	table, err := m.Table(name)
	if err != nil {
		return err
	}
	var doomed []K
	collect := func(key K, _ V) error {
		if match(key) {
			doomed = append(doomed, key)
		}
		return nil
	}
	if table.Type() == ebpf.Hash {
		err = Walk(m, name, collect)
	} else { // a trie or a sockhash has no batches
		var key K
		var value V
		rows := table.Iterate()
		for rows.Next(&key, &value) {
			err = errors.Join(err, collect(key, value))
		}
		err = errors.Join(err, rows.Err())
	}
	if err != nil {
		return fmt.Errorf("walk map %s: %w", name, err)
	}
	if table.Type() == ebpf.Hash {
		return DropMany(m, name, doomed)
	}
	for _, key := range doomed {
		if err := m.Delete(name, key); err != nil {
			return err
		}
	}
	return nil
}

// DropMany deletes rows of a hash table in one call (Linux 5.6); those that are
// gone already are no error.
func DropMany[K any](m *Tables, name string, keys []K) error {
	table, err := m.Table(name)
	if err != nil {
		return err
	}
	for len(keys) > 0 {
		n, err := table.BatchDelete(keys, nil)
		keys = keys[min(n, len(keys)):]
		switch {
		case errors.Is(err, ebpf.ErrKeyNotExist) && len(keys) > 0:
			keys = keys[1:]
		case err != nil:
			return fmt.Errorf("delete from map %s: %w", name, err)
		}
	}
	return nil
}
