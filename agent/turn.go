// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"fmt"
	"slices"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/change"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/wait"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/reconcile"
	"github.com/weirmesh/weir/redirect/workload"
)

// allocationArrived tells that an allocation may have come that no pass has seen.
func (a *Agent) allocationArrived() {
	a.arrived.Store(true)
	a.trigger()
}

// progressed tells everybody who watches the loop that it goes on: one pass may
// take longer than they wait.
func (a *Agent) progressed() {
	a.mu.Lock()
	a.status.Alive = time.Now()
	a.mu.Unlock()
	a.notify("WATCHDOG=1")
}

// byUrgency puts those first that are not under Weir or not configured yet, and
// those last that went wrong before.
func (a *Agent) byUrgency(allocations []desired.Allocation) {
	desired.SortByUrgency(allocations, func(key workload.AttachmentID) bool {
		m := a.allocations[key]
		return m != nil && m.steps.Failures() > 0
	})
}

// differs reports whether the mesh configuration changes what is in force.
func (a *Agent) differs(s desired.Allocation, m *allocState, meshConfig workload.MeshConfig) bool {
	if k := s.Record; k != nil && k.Complete && workload.Merge(k.Request, meshConfig).Equal(workload.Merge(k.Request, k.MeshConfig)) {
		a.note(s.Key, m, "configure", nil)
		return false
	}
	return true
}

// lockPause is for somebody who waits for the node's lock: the kernel gives it to whoever
// asks first once it is free, and that would be the agent.
const lockPause = 2 * time.Millisecond

// addsTogether is how many are put under Weir in one turn of the node's lock: a plugin's
// ADD waits for no more than some tens of milliseconds.
const addsTogether = 16

// addAll puts those under Weir that nobody else does. It knows of them what Consul has
// answered by then: there may be many, and what is known from the first needs no change.
// They have their records from then on: a start gate opens in the pass that adds.
func (a *Agent) addAll(moves []*move) {
	due := slices.DeleteFunc(slices.Clone(moves), func(v *move) bool { return !v.joins })
	if len(due) == 0 {
		return
	}
	for i, together := range slices.Collect(slices.Chunk(due, addsTogether)) {
		if i > 0 {
			time.Sleep(lockPause)
		}
		known := a.consulNow().Facts
		var list []redirect.Attachment
		for _, v := range together {
			v.wanted = desired.For(v.s, known, a.policy())
			list = append(list, redirect.Attachment{Key: v.s.Key, NetNS: v.s.NetNS, Request: *v.wanted.Add, MeshConfig: v.wanted.MeshConfig})
		}
		for i, err := range a.datapath.AddAll(list) {
			together[i].joined(a.added(together[i].s, together[i].m, list[i], "found without a plugin", err))
		}
		a.progressed()
	}
	records, _ := a.records.Records() // of what cannot be read the next pass tells
	for _, v := range due {
		if i := slices.IndexFunc(records, func(k inspect.Record) bool { return k.Key == v.s.Key }); i >= 0 {
			v.s.Record = &records[i]
		}
	}
}

// joined notes what came of it. A mesh configuration that cannot be in force is told of
// as any other is.
func (v *move) joined(state api.State) {
	v.state = state
	if state == api.StateManaged && v.wanted.MeshConfig != nil {
		v.inForce = workload.Merge(*v.wanted.Add, *v.wanted.MeshConfig).Validate() == nil
		v.changes = !v.inForce
	}
}

// applyAll writes the mesh configurations that differ from what is in force, many at
// once, and returns them all. Where this pass has changed enough, the rest is the next one's.
func (a *Agent) applyAll(moves []*move) (due []*move) {
	due = slices.DeleteFunc(slices.Clone(moves), func(v *move) bool { return !v.changes })
	later := slices.IndexFunc(due, func(v *move) bool { return v.s.Configured() })
	for _, together := range wait.Batches(due, later, a.budget.AtOnce(len(a.awaited) > 0)) {
		if a.budget.Started() {
			time.Sleep(lockPause)
		}
		if !a.budget.Allows(len(together), time.Now(), a.arrived.Load() || wait.Came(a.awaited, a.consulNow().Proxies)) {
			continue
		}
		var list []reconcile.MeshChange
		for _, v := range together {
			list = append(list, reconcile.MeshChange{Key: v.s.Key, MeshConfig: *v.wanted.MeshConfig})
		}
		for i, err := range a.datapath.SetMeshConfigs(list) {
			a.applied(together[i], err)
		}
		a.progressed()
	}
	return due
}

func (a *Agent) applied(v *move, err error) {
	a.note(v.s.Key, v.m, "configure", err)
	v.inForce = err == nil
	if err != nil {
		return
	}
	a.settle(v.m, true)
	a.count(func(c *api.Counts) { c.Changes++ })
	meshConfig := v.wanted.MeshConfig
	if v.s.Record != nil {
		v.difference = change.Difference(v.s.Record.MeshConfig, *meshConfig)
	}
	a.log.Info("workload changed", "alloc_id", v.s.Key.ContainerID, "interface", v.s.Key.IfName, "inbound", meshConfig.InboundPort, "outbound", meshConfig.OutboundPort,
		"open", fmt.Sprint(desired.OpenPorts(*meshConfig)), "upstreams", len(meshConfig.Upstreams), "guard", string(meshConfig.Guard))
}

// settle notes that what is wanted of an allocation is in force. Where it was written for
// that, Consul's last change took so long, unless that was in force before, or is older
// than what is known of the allocation.
func (a *Agent) settle(m *allocState, written bool) {
	if written && a.noticed.After(m.settled) && a.noticed.After(m.born) {
		a.consulApply.Observe(time.Since(a.noticed).Seconds())
	}
	m.settled = time.Now()
}
