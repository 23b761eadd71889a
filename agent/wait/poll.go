// SPDX-License-Identifier: MPL-2.0

package wait

import "time"

// PollInterval decides when Consul is asked next.
type PollInterval struct {
	Watch    bool
	Failures int           // in a row
	Waiting  time.Duration // of the newest allocation without a registration; 0: none
}

// Pause is the time until the next read. jitter is from 0 to 1, so that the
// nodes of a cluster do not ask together.
func (t PollInterval) Pause(jitter float64) time.Duration {
	const (
		slowest = time.Minute
		firstly = 5 * time.Second // Nomad registers within a moment of ADD
		atMost  = 2 * time.Minute // later it is no mesh allocation
	)
	spread := func(d time.Duration) time.Duration { return time.Duration(float64(d) * (0.5 + jitter)) }
	switch {
	case t.Failures > 0:
		return spread(min(time.Second<<min(t.Failures-1, 10), slowest))
	case t.Waiting > 0 && t.Waiting < firstly:
		return 250 * time.Millisecond
	case t.Waiting > 0 && t.Waiting < atMost:
		return spread(2 * time.Second)
	case t.Watch:
		return spread(slowest)
	default:
		return spread(15 * time.Second)
	}
}
