// SPDX-License-Identifier: MPL-2.0

package server

import (
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/health"
)

// A table that is nearly full is counted, though the agent lists no problem of it.
func TestProblemsAreCounted(t *testing.T) {
	consul := health.NewProblem(health.ProblemConsulUnreachable, "", "")
	got := countProblems([]health.Problem{consul, consul}, []bpfmap.MapInfo{
		{Name: "origins", Counted: true, Rows: 80, MaxEntries: 100}, {Name: "indexes", Counted: true, Rows: 80, MaxEntries: 100},
		{Name: "upstreams", Counted: true, Rows: 79, MaxEntries: 100},
	})
	for _, code := range health.AllProblemCodes() {
		want := map[health.ProblemCode]int{health.ProblemConsulUnreachable: 2, health.ProblemTableFull: 1}[code]
		if count, found := got[code]; !found || count != want {
			t.Errorf("%s: counted %d times (%t), want %d", code, count, found, want)
		}
	}
}
