// SPDX-License-Identifier: MPL-2.0

// Package wait pauses a loop until its time has come, somebody wakes it, or its
// context ends, and bounds what one pass of it changes.
package wait

import (
	"context"
	"time"
)

// Between is the pause between two turns of what takes so long: it has a tenth of the time
// at most, where that needs no more than most.
func Between(took, least, most time.Duration) time.Duration { return min(max(9*took, least), most) }

// Pause waits. early says that it was cut short, alive that ctx goes on.
func Pause(ctx context.Context, length time.Duration, cut <-chan struct{}) (early, alive bool) {
	timer := time.NewTimer(length)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-cut:
		early = true
	}
	return early, ctx.Err() == nil
}
