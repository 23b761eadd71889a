// SPDX-License-Identifier: MPL-2.0

package wait

import (
	"testing"
	"time"
)

func TestBudget(t *testing.T) {
	began := time.Unix(1000, 0)
	for _, c := range []struct {
		name    string
		after   time.Duration
		done    int
		arrival bool
		want    bool
	}{
		{"the first, however late", time.Hour, 0, true, true},
		{"early", time.Second, 5, false, true},
		{"late", 2 * time.Second, 5, false, false},
		{"early, with an arrival", 100 * time.Millisecond, 5, true, true},
		{"no longer early, with an arrival", 200 * time.Millisecond, 5, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			budget := Budget{Least: 200 * time.Millisecond, Most: 2 * time.Second}
			budget.Begin(began)
			budget.done = c.done
			if got := budget.Allows(3, began.Add(c.after), c.arrival); got != c.want || (budget.Left() == 3) == got {
				t.Errorf("another change is allowed: %v, %d left over; want %v", got, budget.Left(), c.want)
			}
		})
	}
}
