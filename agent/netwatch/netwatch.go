// SPDX-License-Identifier: MPL-2.0

// Package netwatch hears what happens to the networks of workloads after their ADD: an
// address or a route that comes, goes or is replaced.
package netwatch

import (
	"maps"
	"slices"
	"sync"

	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
)

// Watch remembers whose networks changed until they are taken.
type Watch struct {
	watch *host.NetworkWatch // nil: there is none, the round of checks finds what changed
	wake  chan struct{}

	// Of who calls Follow and Keep.
	known map[workload.AttachmentID]followed

	mu      sync.Mutex
	numbers map[int32]workload.AttachmentID
	moved   map[workload.AttachmentID]bool // to look at
}

type followed struct {
	cookie uint64
	number int32
}

// New watches nothing before Start.
func New() *Watch {
	return &Watch{
		wake: make(chan struct{}, 1), known: make(map[workload.AttachmentID]followed),
		numbers: make(map[int32]workload.AttachmentID), moved: make(map[workload.AttachmentID]bool),
	}
}

// Start hears of networks until Close; failed is told why not, or no more.
func (w *Watch) Start(background *sync.WaitGroup, failed func(error)) {
	watch, err := host.NewNetworkWatch()
	if err != nil {
		failed(err) // the round of checks finds what changed
		return
	}
	w.watch = watch
	background.Go(func() {
		if err := w.run(); err != nil {
			failed(err)
		}
	})
}

// Changed is told when there is something to take.
func (w *Watch) Changed() <-chan struct{} { return w.wake }

// Close ends the watch.
func (w *Watch) Close() error {
	if w.watch == nil {
		return nil
	}
	return w.watch.Close()
}

// run takes in what the kernel tells until the watch is closed.
func (w *Watch) run() error {
	return w.watch.Run(func(number int32, lost bool) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if lost {
			for _, key := range w.numbers {
				w.moved[key] = true
			}
		} else if key, there := w.numbers[number]; there {
			w.moved[key] = true
		}
		w.tell()
	})
}

// tell wakes the loop where there is something to look at.
func (w *Watch) tell() {
	if len(w.moved) == 0 {
		return
	}
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Follow hears of the workload's namespace from now on. What happened to it
// before is looked for once.
func (w *Watch) Follow(key workload.AttachmentID, netns string, cookie uint64) error {
	if w.watch == nil || w.known[key].cookie == cookie {
		return nil
	}
	number, err := w.watch.Number(netns)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if before, there := w.known[key]; there && w.numbers[before.number] == key {
		delete(w.numbers, before.number)
	}
	w.known[key] = followed{cookie: cookie, number: number}
	w.numbers[number] = key
	w.moved[key] = true
	w.tell()
	return nil
}

// Keep forgets the workloads that are not managed any more.
func (w *Watch) Keep(managed func(workload.AttachmentID) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	maps.DeleteFunc(w.known, func(key workload.AttachmentID, f followed) bool {
		gone := !managed(key)
		if gone && w.numbers[f.number] == key {
			delete(w.numbers, f.number)
		}
		return gone
	})
}

// Take returns what is to be looked at, sorted.
func (w *Watch) Take() []workload.AttachmentID {
	w.mu.Lock()
	defer w.mu.Unlock()
	keys := slices.SortedFunc(maps.Keys(w.moved), desired.CompareKeys)
	clear(w.moved)
	return keys
}
