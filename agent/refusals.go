// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"time"

	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/flow"
	"github.com/weirmesh/weir/agent/refusal"
)

// refusedAgain is what is told of an allocation whose guard refuses what it let in.
func (a *Agent) refusedAgain(m *allocState, s desired.Allocation, now time.Time) []flow.RefusedPort {
	if !m.refused.OfGuard() || s.Record == nil {
		return nil
	}
	return a.flows.RefusedAgain(*s.Record, now.Add(-refusal.Memory))
}

// readRefusals reads the counters of the workloads that the agent keeps.
func (a *Agent) readRefusals(now time.Time) {
	var cookies []uint64
	for _, m := range a.allocations {
		if m.hook != 0 {
			cookies = append(cookies, m.hook)
		}
	}
	counts, err := a.datapath.VerdictCounts(cookies)
	if err != nil {
		return // the data path is on its way back, and its own problem
	}
	changed := false
	for _, m := range a.allocations {
		if m.hook != 0 {
			changed = m.refused.Note(counts[m.hook], m.proxies.AllListen(), now) || changed
		}
	}
	if changed {
		a.trigger() // it is shown
	}
}
