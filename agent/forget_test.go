// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"slices"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/workload"
)

// A transparent allocation that Consul does not know is a problem, but not at once, and not
// where Consul may have what the token is not shown.
func TestAllocationThatConsulDoesNotKnow(t *testing.T) {
	n := newNode(t)
	_, key := n.transparent(numbered(1))
	n.cached(numbered(2), "/nowhere", "") // not in the mesh
	n.fake.answers(registered(numbered(1)))
	a := n.newStepwise()
	wants := func(want bool) {
		t.Helper()
		a.asks(t.Context())
		code := health.ProblemNotRegistered.String()
		for _, w := range a.Status().Workloads {
			if got := slices.ContainsFunc(w.Problems, func(p health.Problem) bool { return p.Code == code }); w.Key == key && got != want {
				t.Errorf("problems are %v, want %s among them: %v", w.Problems, code, want)
			}
		}
	}
	wants(false)
	n.fake.answers(registered())
	wants(false)
	m := a.allocations[workload.AttachmentID{ContainerID: numbered(1), IfName: "eth0"}]
	if m == nil || m.absent.IsZero() {
		t.Fatalf("the agent has not seen it go: %+v", m)
	}
	m.absent = m.absent.Add(-registrationGrace)
	wants(true)
	n.fake.answers(registered(numbered(1)))
	wants(false)
	if !m.absent.IsZero() {
		t.Errorf("absent since %s, though it is registered", time.Since(m.absent))
	}
}
