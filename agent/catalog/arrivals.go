// SPDX-License-Identifier: MPL-2.0

package catalog

import (
	"context"
	"crypto/sha256"
	"maps"
	"slices"
	"time"

	"github.com/weirmesh/weir/agent/registration"
)

// While an allocation is about to be registered, Consul is asked for its registrations
// alone: the answer with those of all proxies of the node takes longest where all of them
// change.

const (
	mostAlone = 16                     // so many are asked for; among more the bulk read is as good
	bulkApart = 500 * time.Millisecond // between two bulk reads meanwhile
)

// Await tells which allocations wait for their registration, and since when the newest
// does; the zero time says that none does.
func (f *Watcher) Await(since time.Time, allocations ...string) {
	f.mu.Lock()
	began := since.After(f.waiting)
	f.waiting, f.awaited = since, allocations
	f.mu.Unlock()
	if began {
		f.Wake()
	}
}

// alone are the allocations to ask for instead of a bulk read, which is not due yet.
func (f *Watcher) alone() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	asked := slices.DeleteFunc(slices.Clone(f.awaited), func(id string) bool { return !registration.IsAllocID(id) || len(f.view.Proxies[id]) > 0 })
	if len(asked) > mostAlone || !f.view.InSync || time.Since(f.bulk) >= bulkApart {
		return nil
	}
	return asked
}

// readAlone takes in what Consul has of these allocations, and reports whether it answered.
// What else changed is the next bulk read's, which is owed from then on.
func (f *Watcher) readAlone(ctx context.Context, allocations []string) bool {
	began := time.Now()
	got, err := f.Client.ServicesOf(ctx, allocations)
	if err != nil {
		return false
	}
	found, _, err := registration.ParseServices(got.Body, f.self.Loopback)
	if err != nil {
		return false
	}
	f.owed = true
	next := f.Current()
	all := maps.Clone(next.Proxies)
	for id, proxies := range ByAllocation(found) {
		if slices.Contains(allocations, id) {
			all[id] = proxies
		}
	}
	if len(all) == len(next.Proxies) {
		return true
	}
	f.digest = [sha256.Size]byte{} // an answer without them must not look like the last one
	next.Proxies, next.Noticed = all, began
	if known, moved := f.Lookups.Refresh(ctx, all); moved {
		next.Facts = known
	}
	next.Counts.Changes++
	f.publish(next)
	f.changed()
	return true
}
