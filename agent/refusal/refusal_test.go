// SPDX-License-Identifier: MPL-2.0

package refusal

import (
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/flow"
	"github.com/weirmesh/weir/redirect/health"
)

// A count that rises is a problem for a minute, but for what is no fault.
func TestRefusalIsAProblemForAMinute(t *testing.T) {
	const (
		noProxy, budget, guard, audit = "refused_no_proxy", "refused_budget", "refused_guard", "guard_audit"
		identity                      = "refused_listener_identity"
	)
	type look struct {
		after   time.Duration // since the first
		counts  map[string]uint64
		silent  bool // the proxy does not listen
		want    string
		changed bool
	}
	for name, looks := range map[string][]look{
		"what was counted before is not of now": {
			{counts: map[string]uint64{budget: 7}},
			{after: 10 * time.Second, counts: map[string]uint64{budget: 7}},
		},
		"a count that rises, until a minute later": {
			{counts: map[string]uint64{budget: 7}},
			{after: 10 * time.Second, counts: map[string]uint64{budget: 8}, want: "refused_budget", changed: true},
			{after: 20 * time.Second, counts: map[string]uint64{budget: 9}, want: "refused_budget"},
			{after: 79 * time.Second, counts: map[string]uint64{budget: 9}, want: "refused_budget"},
			{after: 80 * time.Second, counts: map[string]uint64{budget: 9}, changed: true},
		},
		"a proxy that stopped and is back": {
			{},
			{after: 10 * time.Second, counts: map[string]uint64{noProxy: 1}, want: "refused_no_proxy", changed: true},
		},
		"a proxy that starts": {
			{silent: true},
			{after: 10 * time.Second, counts: map[string]uint64{noProxy: 5}},
			{after: 20 * time.Second, counts: map[string]uint64{noProxy: 5}},
		},
		"a proxy that stops": {
			{},
			{after: 10 * time.Second, counts: map[string]uint64{noProxy: 5}, silent: true},
		},
		"a socket beside a proxy that listens": {
			{},
			{after: 10 * time.Second, counts: map[string]uint64{identity: 1}},
		},
		"a socket in the proxy's place": {
			{silent: true},
			{after: 10 * time.Second, counts: map[string]uint64{identity: 1}, silent: true, want: "refused_listener_identity", changed: true},
		},
		"a guard from the beginning": {
			{},
			{after: 10 * time.Second, counts: map[string]uint64{guard: 3}},
		},
		"a guard that let some in": {
			{counts: map[string]uint64{audit: 3}},
			{after: 10 * time.Second, counts: map[string]uint64{audit: 3, guard: 3}, want: "guard-refuses", changed: true},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var r Refusals
			first := time.Now()
			for _, l := range looks {
				counts := l.counts
				if counts == nil {
					counts = map[string]uint64{}
				}
				changed := r.Note(counts, !l.silent, first.Add(l.after))
				var codes []string
				for _, problem := range r.Problems(nil) {
					codes = append(codes, problem.Code)
				}
				if got := strings.Join(codes, ","); got != l.want || changed != l.changed {
					t.Errorf("after %s the problems are %q, changed %t; want %q, %t", l.after, got, changed, l.want, l.changed)
				}
			}
		})
	}
}

// Each refusal that is a fault by itself says what helps.
func TestEachRefusalHasARemedy(t *testing.T) {
	for verdict, code := range codes() {
		r := Refusals{last: map[health.ProblemCode]time.Time{code: time.Now()}}
		problems := r.Problems(nil)
		if len(problems) != 1 || problems[0].Remedy == "" || !strings.HasPrefix(problems[0].What, "in the last minute: ") {
			t.Errorf("problems for %s are %+v", verdict, problems)
		}
	}
}

// The guard's problem names ports and sources, few of many, and the line of the job for
// the first of them.
func TestGuardProblemNamesPortsAndSources(t *testing.T) {
	r := Refusals{last: map[health.ProblemCode]time.Time{health.ProblemGuardRefuses: time.Now()}}
	problems := r.Problems([]flow.RefusedPort{
		{Port: 80, Sources: []string{"10.0.0.1"}, Remedy: `transparent_proxy { exclude_inbound_ports = ["80"] }`}, {Port: 8080, Sources: []string{"10.0.0.1", "10.0.0.2", "web/g/b412a0b1"}},
		{Port: 9000, Sources: []string{"10.0.0.3"}}, {Port: 9001, Sources: []string{"10.0.0.3"}},
	})
	if len(problems) != 1 {
		t.Fatalf("problems are %+v, want one", problems)
	}
	what := "in the last minute: the guard refuses connections to an allocation that it had let some in to: " +
		"port 80 from 10.0.0.1; port 8080 from 10.0.0.1, 10.0.0.2 and 1 more; port 9000 from 10.0.0.3; and 1 more ports"
	remedy := `transparent_proxy { exclude_inbound_ports = ["80"] } in its job lets it in; 'weir guard'`
	if p := problems[0]; p.What != what || !strings.HasPrefix(p.Remedy, remedy) {
		t.Errorf("problem is %q\nwith remedy %q\nwant %q\nand %q", p.What, p.Remedy, what, remedy)
	}
}
