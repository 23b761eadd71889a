// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"maps"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/redirect/workload"
)

// forget drops what is gone. An attachment that no plugin of ours will be
// called for at DEL ends when libcni forgets it.
func (a *Agent) forget(allocations []desired.Allocation, now time.Time) {
	for _, s := range allocations {
		m := a.allocations[s.Key]
		if s.Cached {
			m.cached, m.ended = true, time.Time{}
			continue
		}
		if m.cached && m.ended.IsZero() {
			m.ended = now
		}
		// One that lives on without libcni's file keeps what it has until it dies.
		if !m.cached || s.Record == nil || s.Live {
			continue
		}
		if s.Record.Request.Mode == workload.ModeTransparent {
			// Its DEL is the plugin's; where there was none, its namespace tells.
			m.cached, a.pruned = false, time.Time{}
			continue
		}
		if !a.budget.Allows(1, time.Now(), a.arrived.Load()) {
			continue
		}
		err := a.datapath.Remove(s.Key)
		a.note(s.Key, m, "remove", err)
		a.progressed()
		if err == nil {
			m.cached = false
			a.count(func(c *api.Counts) { c.Removed++ })
			a.log.Info("workload removed: its allocation ended", "alloc_id", s.Key.ContainerID, "interface", s.Key.IfName)
			a.trigger()
		}
	}
	there := make(map[workload.AttachmentID]bool, len(allocations))
	for _, s := range allocations {
		there[s.Key] = true
	}
	a.closeGates(func(key workload.AttachmentID) bool { return there[key] })
	maps.DeleteFunc(a.allocations, func(key workload.AttachmentID, m *allocState) bool {
		if !there[key] && m.view.State == api.StateManaged {
			a.changes.Workload(m.view, api.ChangeRemoved, "its allocation ended", now)
		}
		return !there[key]
	})
}
