// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/weirmesh/weir/redirect"
)

// turn bounds what one pass changes, so that nobody waits for a change that
// concerns all workloads: neither an allocation that arrives meanwhile nor what
// the loop does by the clock. What puts a workload under Weir is never put off.
type turn struct {
	least, most time.Duration // of changing, with and without an arrival

	began time.Time
	done  int // changes
	left  int // ... that are the next pass's
}

func defaultTurn() turn { return turn{least: 200 * time.Millisecond, most: 2 * time.Second} }

// begin begins a pass.
func (t *turn) begin(now time.Time) { t.began, t.done, t.left = now, 0, 0 }

// allows reports whether this pass makes another change. The first is always
// made, so that there is an end.
func (t *turn) allows(now time.Time, arrival bool) bool {
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

// arrive tells that an allocation may have come that no pass has seen.
func (a *Agent) arrive() {
	a.arrived.Store(true)
	a.hurry()
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
func (a *Agent) byUrgency(subjects []subject) {
	urgency := func(s subject) int {
		m := a.subjects[s.Key]
		switch {
		case m != nil && m.failures > 0:
			return 3
		case s.Known == nil:
			return 0
		case s.Known.Overlay.Guard == "":
			return 1
		}
		return 2
	}
	slices.SortStableFunc(subjects, func(s, t subject) int { return cmp.Compare(urgency(s), urgency(t)) })
}

// apply writes the overlay where it changes what is in force, and reports
// whether it is in force now. Where this pass has changed enough it is not, and
// the next one's.
func (a *Agent) apply(s subject, m *memory, overlay redirect.Overlay) bool {
	if k := s.Known; k != nil && k.Complete && redirect.Merge(k.Request, overlay).Equal(redirect.Merge(k.Request, k.Overlay)) {
		a.note(m, "configure", nil)
		return true
	}
	if !a.turn.allows(time.Now(), a.arrived.Load()) {
		return false
	}
	err := a.datapath.SetOverlay(s.Key, overlay)
	a.note(m, "configure", err)
	a.progressed()
	if err == nil {
		a.count(func(c *Counts) { c.Changes++ })
		a.log.Info("workload changed", "workload", s.Key.String(), "inbound", overlay.InboundPort, "outbound", overlay.OutboundPort,
			"open", fmt.Sprint(openPorts(overlay)), "upstreams", len(overlay.Upstreams), "guard", string(overlay.Guard))
	}
	return err == nil
}
