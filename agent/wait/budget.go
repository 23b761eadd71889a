// SPDX-License-Identifier: MPL-2.0

package wait

import (
	"slices"
	"time"
)

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

// AtOnce is how many changes are made at once: while an allocation is about to be
// registered fewer, as the pass that configures it comes after them.
func (b *Budget) AtOnce(arrival bool) int {
	if arrival {
		return max(b.Together/4, 1)
	}
	return max(b.Together, 1)
}

// Batches are the changes that are made at once, each of size at most. The ones from place
// later on share none with those before them, who would wait for them; -1: there are none.
func Batches[T any](changes []T, later, size int) [][]T {
	if later < 0 {
		later = len(changes)
	}
	first := slices.Collect(slices.Chunk(changes[:later], size))
	return slices.AppendSeq(first, slices.Chunk(changes[later:], size))
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
