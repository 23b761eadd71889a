// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"sync"
	"time"

	"github.com/weirmesh/weir/redirect"
)

// The bounds of a table of what a guard counts. Whoever scans ports, or dials many
// places, fills no more than the share of one allocation.
const (
	guardEntries = 8192
	guardShare   = 256
)

// ofWorkload is a key of such a table.
type ofWorkload interface {
	comparable
	workload() (cookie uint64)
}

// shareTable has so many entries at most for each workload, and for all of them.
type shareTable[K ofWorkload, V any] struct {
	mu      sync.Mutex
	entries map[K]*V
	share   map[uint64]int // entries by the workload's cookie
	omitted uint64         // what found no room
}

func newShareTable[K ofWorkload, V any]() shareTable[K, V] {
	return shareTable[K, V]{entries: make(map[K]*V), share: make(map[uint64]int)}
}

// entry is that of the key, or a fresh one, or nil where there is no room. The caller
// holds mu.
func (t *shareTable[K, V]) entry(key K, fresh V) *V {
	if entry := t.entries[key]; entry != nil {
		return entry
	}
	if len(t.entries) >= guardEntries || t.share[key.workload()] >= guardShare {
		t.omitted++
		return nil
	}
	t.entries[key] = &fresh
	t.share[key.workload()]++
	return &fresh
}

// forget drops what is of workloads that are gone. One that came after the list was
// made is not gone. last is when an entry was counted, in nanoseconds of Unix time.
func (t *shareTable[K, V]) forget(known []redirect.Record, now time.Time, last func(*V) int64) {
	there := make(map[uint64]bool, len(known))
	for _, k := range known {
		there[k.Cookie] = true
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for key, entry := range t.entries {
		cookie := key.workload()
		if there[cookie] || now.Sub(time.Unix(0, last(entry))) < time.Minute {
			continue
		}
		delete(t.entries, key)
		if t.share[cookie]--; t.share[cookie] == 0 {
			delete(t.share, cookie)
		}
	}
}
