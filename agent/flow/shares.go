// SPDX-License-Identifier: MPL-2.0

package flow

import (
	"sync"
	"time"

	"github.com/weirmesh/weir/redirect/inspect"
)

// The bounds of a table of what a guard counts. Whoever scans ports, or dials many
// places, fills no more than the share of one allocation.
const (
	guardEntries = 8192
	GuardShare   = 256
)

// ofWorkload is a key of such a table.
type ofWorkload interface {
	comparable
	workload() (cookie uint64)
}

// shareTable has so many entries at most for each workload, and for all of them.
type shareTable[K ofWorkload, V any] struct {
	mu      sync.Mutex
	Entries map[K]*V
	Share   map[uint64]int // entries by the workload's cookie
	omitted uint64         // what found no room
}

func newShareTable[K ofWorkload, V any]() shareTable[K, V] {
	return shareTable[K, V]{Entries: make(map[K]*V), Share: make(map[uint64]int)}
}

// entry is that of the key, or a fresh one, or nil where there is no room. The caller
// holds mu.
func (t *shareTable[K, V]) entry(key K, fresh V) *V {
	if entry := t.Entries[key]; entry != nil {
		return entry
	}
	if len(t.Entries) >= guardEntries || t.Share[key.workload()] >= GuardShare {
		t.omitted++
		return nil
	}
	t.Entries[key] = &fresh
	t.Share[key.workload()]++
	return &fresh
}

// forget drops what is of workloads that are gone. One that came after the list was
// made is not gone. last is when an entry was counted, in nanoseconds of Unix time.
func (t *shareTable[K, V]) forget(known []inspect.Record, now time.Time, last func(*V) int64) {
	there := make(map[uint64]bool, len(known))
	for _, k := range known {
		there[k.Cookie] = true
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for key, entry := range t.Entries {
		cookie := key.workload()
		if there[cookie] || now.Sub(time.Unix(0, last(entry))) < time.Minute {
			continue
		}
		t.delete(key)
	}
}

// delete makes room. The caller holds mu.
func (t *shareTable[K, V]) delete(key K) {
	delete(t.Entries, key)
	cookie := key.workload()
	if t.Share[cookie]--; t.Share[cookie] == 0 {
		delete(t.Share, cookie)
	}
}
