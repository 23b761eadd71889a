// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"slices"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect/health"
)

// A transparent allocation that Consul does not know is a problem, but not at once, and not
// where Consul may have what the token is not shown.
func TestAllocationThatConsulDoesNotKnow(t *testing.T) {
	n := newNode(t)
	_, key := n.transparent(numbered(1))
	began := time.Now()
	n.cached(numbered(2), "/nowhere", "") // not in the mesh
	n.fake.answers(registered(numbered(1)))
	a := n.newStepwise()
	wants := func(want bool, after time.Duration) {
		t.Helper()
		a.consul.Read(t.Context())
		a.consul.Look(t.Context())
		a.reconcile(began.Add(after))
		code := health.ProblemNotRegistered.String()
		for _, w := range a.Status().Workloads {
			if got := slices.ContainsFunc(w.Problems, func(p health.Problem) bool { return p.Code == code }); w.Key == key && got != want {
				t.Errorf("problems are %v, want %s among them: %v", w.Problems, code, want)
			}
		}
	}
	wants(false, 0)
	n.fake.answers(registered())
	wants(false, time.Minute)
	wants(true, 7*time.Minute)
	n.fake.answers(registered(numbered(1)))
	wants(false, 8*time.Minute)
	n.fake.answers(registered())
	wants(false, 9*time.Minute)
	wants(false, 10*time.Minute) // of the time before it was registered again, none counts
	wants(true, 15*time.Minute)
}
