// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"time"
)

// pause waits. early says that it was cut short, alive that ctx goes on.
func pause(ctx context.Context, length time.Duration, cut <-chan struct{}) (early, alive bool) {
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
