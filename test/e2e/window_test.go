// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// How long an allocation that no plugin was called for stands open: a neighbour
// dials its application until the guard refuses. docs/limits.md names the
// medians.
func TestTimeUntilTheGuard(t *testing.T) {
	n := newMeshNode(t, false)
	n.config.Guard.Default = string(workload.GuardEnforce)
	n.runAgent()
	for _, c := range []struct {
		name    string
		measure func() time.Duration
	}{
		{"from libcni's result, with Consul already knowing the proxy", func() time.Duration {
			next := &meshAlloc{node: n, id: allocID(n.allocs + 1)}
			next.registerInConsul("web", object{"Address": "10.88.0.2", "Port": 20001})
			test.Eventually(t, func() error {
				_, err := next.view()
				return err
			}, "the agent to know the registration")
			n.wantCalm(t)
			a := n.allocate("", object{"hostPort": 20001, "containerPort": 20001, "protocol": "tcp"})
			return a.untilRefused(t, time.Now())
		}},
		{"from the registration in Consul, of an allocation that waits for it", func() time.Duration {
			a := n.allocate("")
			n.wantCalm(t)
			a.register("web", object{"Port": 20001})
			return a.untilRefused(t, time.Now())
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var times []time.Duration
			for range test.Scale(9) {
				times = append(times, c.measure())
			}
			slices.Sort(times)
			median := times[len(times)/2]
			t.Logf("median %s, from %s to %s, of %d", median, times[0], times[len(times)-1], len(times))
			if median > time.Second {
				t.Errorf("median = %s, want at most a second", median)
			}
		})
	}
}

// untilRefused dials the application from outside until it is refused, and
// returns how long after the beginning that was.
func (a *meshAlloc) untilRefused(t *testing.T, began time.Time) time.Duration {
	t.Helper()
	test.Echo(t, a.ns, "tcp4", "0.0.0.0:8080")
	for {
		_, err := test.Ask(a.node.outside, "tcp4", a.at(8080).String())
		took := time.Since(began)
		switch {
		case errors.Is(err, syscall.ECONNREFUSED):
			return took
		case took > 30*time.Second:
			t.Fatalf("still open after %s: %v", took, err)
		}
	}
}

// wantCalm waits until the agent has nothing left to do of what happened so far.
func (n *meshNode) wantCalm(t *testing.T) {
	t.Helper()
	since := time.Now()
	test.Eventually(t, func() error {
		// Turns that have a cause are closer to each other.
		if now := n.mustStatus(t).Alive; now.Sub(since) < 500*time.Millisecond {
			return fmt.Errorf("last turn at %s", now)
		}
		return nil
	}, "the agent to be calm")
}
