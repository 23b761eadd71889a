// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/weirmesh/weir/redirect/workload"
)

// passBudget bounds what one pass changes, so that nobody waits for a change that
// concerns all workloads: neither an allocation that arrives meanwhile nor what
// the loop does by the clock. What puts a workload under Weir is never put off.
type passBudget struct {
	least, most time.Duration // of changing, with and without an arrival

	began time.Time
	done  int // changes
	left  int // ... that are the next pass's
}

func defaultPassBudget() passBudget {
	return passBudget{least: 200 * time.Millisecond, most: 2 * time.Second}
}

// begin begins a pass.
func (t *passBudget) begin(now time.Time) { t.began, t.done, t.left = now, 0, 0 }

// allows reports whether this pass makes another change. The first is always
// made, so that there is an end.
func (t *passBudget) allows(now time.Time, arrival bool) bool {
	limit := t.most
	if arrival {
		limit = t.least
	}
	if t.done > 0 && now.Sub(t.began) >= limit {
		t.left++
		return false
	}
	t.done++
	return true
}

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
func (a *Agent) byUrgency(allocations []allocation) {
	urgency := func(s allocation) int {
		m := a.allocations[s.Key]
		switch {
		case m != nil && m.failures > 0:
			return 3
		case s.Record == nil:
			return 0
		case s.Record.MeshConfig.Guard == "":
			return 1
		}
		return 2
	}
	slices.SortStableFunc(allocations, func(s, t allocation) int { return cmp.Compare(urgency(s), urgency(t)) })
}

// apply writes the mesh configuration where it changes what is in force, and reports
// whether it is in force now. Where this pass has changed enough it is not, and
// the next one's.
func (a *Agent) apply(s allocation, m *allocState, meshConfig workload.MeshConfig) bool {
	if k := s.Record; k != nil && k.Complete && workload.Merge(k.Request, meshConfig).Equal(workload.Merge(k.Request, k.MeshConfig)) {
		a.note(s.Key, m, "configure", nil)
		return true
	}
	if !a.budget.allows(time.Now(), a.arrived.Load()) {
		return false
	}
	err := a.datapath.SetMeshConfig(s.Key, meshConfig)
	a.note(s.Key, m, "configure", err)
	a.progressed()
	if err == nil {
		a.count(func(c *Counts) { c.Changes++ })
		a.log.Info("workload changed", "alloc_id", s.Key.ContainerID, "interface", s.Key.IfName, "inbound", meshConfig.InboundPort, "outbound", meshConfig.OutboundPort,
			"open", fmt.Sprint(openPorts(meshConfig)), "upstreams", len(meshConfig.Upstreams), "guard", string(meshConfig.Guard))
	}
	return err == nil
}
