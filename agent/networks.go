// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"sync"

	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// watchNetworks hears of the networks of workloads until they are closed.
func (a *Agent) watchNetworks(background *sync.WaitGroup) {
	a.networks.Start(background, func(err error) {
		a.warnOnce("watch networks", err)
		a.mu.Lock()
		a.networkProblem = err.Error()
		a.mu.Unlock()
	})
}

// checkMoved verifies the workloads whose networks changed. Most of what happens
// to a network concerns no row: then nothing is done.
func (a *Agent) checkMoved() {
	for _, key := range a.networks.Take() {
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
		if err := a.networks.Follow(k.Key, k.NetNS, k.Cookie); err != nil && host.Inode(k.NetNS) != 0 {
			a.warnOnce("follow networks", err)
		}
	}
	a.networks.Keep(func(key workload.AttachmentID) bool { return there[key] })
}
