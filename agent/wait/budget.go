// SPDX-License-Identifier: MPL-2.0

package wait

import "time"

// Budget bounds what one pass changes, so that nobody waits for a change that
// concerns all workloads: neither an allocation that arrives meanwhile nor what
// the loop does by the clock. What puts a workload under Weir is never put off.
type Budget struct {
	Least, Most time.Duration // of changing, with and without an arrival
	Together    int           // changes at once, which nothing interrupts

	began time.Time
	done  int // changes
	left  int // ... that are the next pass's
}

// Begin begins a pass.
func (b *Budget) Begin(now time.Time) { b.began, b.done, b.left = now, 0, 0 }

// Allows reports whether this pass makes so many more changes. The first are always
// made, so that there is an end.
func (b *Budget) Allows(changes int, now time.Time, arrival bool) bool {
	limit := b.Most
	if arrival {
		limit = b.Least
	}
	if b.done > 0 && now.Sub(b.began) >= limit {
		b.left += changes
		return false
	}
	b.done += changes
	return true
}

// Started reports whether this pass made a change.
func (b *Budget) Started() bool { return b.done > 0 }

// Left is how many changes are the next pass's.
func (b *Budget) Left() int { return b.left }
