// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"maps"
	"slices"
	"sync"

	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// networks follows what happens to the networks of workloads after their ADD:
// an address or a route that comes, goes or is replaced.
type networks struct {
	watch *host.NetworkWatch // nil: there is none, the round of checks finds what changed
	wake  chan struct{}

	problem string // why there is no watch; the agent's mutex guards it

	// The loop's alone.
	followed map[workload.AttachmentID]followedNetwork

	mu      sync.Mutex
	numbers map[int32]workload.AttachmentID
	moved   map[workload.AttachmentID]bool // to look at
}

type followedNetwork struct {
	cookie uint64
	number int32
}

func newNetworks() *networks {
	return &networks{
		wake: make(chan struct{}, 1), followed: make(map[workload.AttachmentID]followedNetwork),
		numbers: make(map[int32]workload.AttachmentID), moved: make(map[workload.AttachmentID]bool),
	}
}

// watchNetworks hears of the networks of workloads until Close.
func (a *Agent) watchNetworks(background *sync.WaitGroup) {
	failed := func(err error) {
		a.warnOnce("watch networks", err)
		a.mu.Lock()
		a.networks.problem = err.Error()
		a.mu.Unlock()
	}
	watch, err := host.NewNetworkWatch()
	if err != nil {
		failed(err) // the round of checks finds what changed
		return
	}
	a.networks.watch = watch
	background.Go(func() {
		if err := a.networks.run(); err != nil {
			failed(err)
		}
	})
}

// Close ends the watch.
func (n *networks) Close() error {
	if n.watch == nil {
		return nil
	}
	return n.watch.Close()
}

// run takes in what the kernel tells until the watch is closed.
func (n *networks) run() error {
	return n.watch.Run(func(number int32, lost bool) {
		n.mu.Lock()
		defer n.mu.Unlock()
		if lost {
			for _, key := range n.numbers {
				n.moved[key] = true
			}
		} else if key, known := n.numbers[number]; known {
			n.moved[key] = true
		}
		n.tell()
	})
}

// tell wakes the loop where there is something to look at.
func (n *networks) tell() {
	if len(n.moved) == 0 {
		return
	}
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// follow hears of the workload's namespace from now on. What happened to it
// before is looked for once.
func (n *networks) follow(key workload.AttachmentID, netns string, cookie uint64) error {
	if n.watch == nil || n.followed[key].cookie == cookie {
		return nil
	}
	number, err := n.watch.Number(netns)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if before, known := n.followed[key]; known && n.numbers[before.number] == key {
		delete(n.numbers, before.number)
	}
	n.followed[key] = followedNetwork{cookie: cookie, number: number}
	n.numbers[number] = key
	n.moved[key] = true
	n.tell()
	return nil
}

// keep forgets the workloads that are not managed any more.
func (n *networks) keep(managed func(workload.AttachmentID) bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	maps.DeleteFunc(n.followed, func(key workload.AttachmentID, f followedNetwork) bool {
		gone := !managed(key)
		if gone && n.numbers[f.number] == key {
			delete(n.numbers, f.number)
		}
		return gone
	})
}

// take returns what is to be looked at, sorted.
func (n *networks) take() []workload.AttachmentID {
	n.mu.Lock()
	defer n.mu.Unlock()
	keys := slices.SortedFunc(maps.Keys(n.moved), desired.CompareKeys)
	clear(n.moved)
	return keys
}

// checkMoved verifies the workloads whose networks changed. Most of what happens
// to a network concerns no row: then nothing is done.
func (a *Agent) checkMoved() {
	for _, key := range a.networks.take() {
		if a.allocations[key] == nil {
			continue
		}
		if moved, err := a.datapath.Moved(key); err == nil && moved {
			a.check(key)
		}
	}
}

// followNetworks hears of the networks of all that is under Weir.
func (a *Agent) followNetworks(known []inspect.Record) {
	there := make(map[workload.AttachmentID]bool, len(known))
	for _, k := range known {
		m := a.allocations[k.Key]
		if m == nil || m.hook != k.Cookie {
			continue
		}
		there[k.Key] = true
		if err := a.networks.follow(k.Key, k.NetNS, k.Cookie); err != nil && host.Inode(k.NetNS) != 0 {
			a.warnOnce("follow networks", err)
		}
	}
	a.networks.keep(func(key workload.AttachmentID) bool { return there[key] })
}
