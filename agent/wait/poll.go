// SPDX-License-Identifier: MPL-2.0

package wait

import (
	"slices"
	"time"
)

const (
	// registersWithin is how long after an ADD its registration is expected at any moment:
	// Nomad makes it as soon as it has the network.
	registersWithin = 5 * time.Second
	// registersEver is when an allocation without a registration counts as one that is not in
	// the mesh.
	registersEver = 2 * time.Minute
)

// Arrivals are the allocations that wait for a registration.
type Arrivals struct {
	Now    time.Time
	Newest time.Time // when the last of them came; zero: none waits
	Soon   []string  // the IDs of those whose registration is expected at any moment
}

// Add adds one that came then. It may have waited for too long.
func (a *Arrivals) Add(id string, came time.Time) {
	waited := a.Now.Sub(came)
	if waited <= registersEver && came.After(a.Newest) {
		a.Newest = came
	}
	if waited < registersWithin {
		a.Soon = append(a.Soon, id)
	}
}

// Came reports whether the registration is there that one of the allocations waits for.
func Came[P any](awaited []string, registered map[string][]P) bool {
	return slices.ContainsFunc(awaited, func(id string) bool { return len(registered[id]) > 0 })
}

// PollInterval decides when Consul is asked next.
type PollInterval struct {
	Watch    bool
	Failures int           // in a row
	Waiting  time.Duration // of the newest allocation without a registration; 0: none
	Took     time.Duration // the last read
}

// Pause is the time until the next read. jitter is from 0 to 1, so that the
// nodes of a cluster do not ask together.
func (t PollInterval) Pause(jitter float64) time.Duration {
	const slowest = time.Minute
	spread := func(d time.Duration) time.Duration { return time.Duration(float64(d) * (0.5 + jitter)) }
	switch {
	case t.Failures > 0:
		return spread(min(time.Second<<min(t.Failures-1, 10), slowest))
	case t.Waiting > 0 && t.Waiting < registersWithin:
		return Between(t.Took, 50*time.Millisecond, 150*time.Millisecond) // most ask for that allocation alone
	case t.Waiting > 0 && t.Waiting < registersEver:
		return spread(2 * time.Second)
	case t.Watch:
		return spread(slowest)
	default:
		return spread(15 * time.Second)
	}
}
