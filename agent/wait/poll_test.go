// SPDX-License-Identifier: MPL-2.0

package wait

import (
	"slices"
	"testing"
	"time"
)

func TestArrivals(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	a := Arrivals{Now: now}
	for id, age := range map[string]time.Duration{"new": time.Second, "newer": 0, "old": time.Minute, "outside the mesh": time.Hour} {
		a.Add(id, now.Add(-age))
	}
	slices.Sort(a.Soon)
	if !a.Newest.Equal(now) || !slices.Equal(a.Soon, []string{"new", "newer"}) {
		t.Errorf("the newest came %s, expected soon are %q", a.Newest, a.Soon)
	}
	none := Arrivals{Now: now}
	none.Add("outside the mesh", now.Add(-time.Hour))
	if !none.Newest.IsZero() || len(none.Soon) > 0 {
		t.Errorf("without any that waits: %+v", none)
	}
}

func TestBatches(t *testing.T) {
	for _, c := range []struct {
		later int
		want  [][]int
	}{
		{-1, [][]int{{1, 2}, {3, 4}, {5}}},
		{0, [][]int{{1, 2}, {3, 4}, {5}}},
		{1, [][]int{{1}, {2, 3}, {4, 5}}},
		{5, [][]int{{1, 2}, {3, 4}, {5}}},
	} {
		got := Batches([]int{1, 2, 3, 4, 5}, c.later, 2)
		if !slices.EqualFunc(got, c.want, slices.Equal[[]int]) {
			t.Errorf("later from %d: %v, want %v", c.later, got, c.want)
		}
	}
	if got := Batches([]int(nil), -1, 2); len(got) > 0 {
		t.Errorf("of nothing: %v", got)
	}
	b := Budget{Together: 64}
	if b.AtOnce(false) != 64 || b.AtOnce(true) != 16 {
		t.Errorf("at once %d, %d with an arrival", b.AtOnce(false), b.AtOnce(true))
	}
}
