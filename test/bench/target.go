// SPDX-License-Identifier: MPL-2.0

package main

import (
	"fmt"
	"strings"
)

// A verdict says whether a row reached what it was to reach.
type verdict struct {
	Goal    string `json:"goal"`
	Figure  string `json:"figure"`
	Reached bool   `json:"reached"`
}

// addedCost: Weir adds at most a fifth of what iptables adds.
func addedCost(r row) verdict {
	ours := summarize(differences(r.Samples[weir], r.Samples[direct])).Median
	theirs := summarize(differences(r.Samples[consul], r.Samples[direct])).Median
	return verdict{
		Goal:    "added at most 0.2 of iptables-nft's",
		Figure:  fmt.Sprintf("%+.1f to %+.1f %s, %.2f", ours, theirs, r.Unit, ours/theirs),
		Reached: theirs > 0 && ours <= 0.2*theirs,
	}
}

// asTheFloor: Weir cannot be told from no redirection, by what the floor's own
// repetition shows.
func asTheFloor(r row) verdict {
	ours := summarize(ratios(r.Samples[weir], r.Samples[direct])).Median
	noise := min(summarize(ratios(r.Samples[directAgain], r.Samples[direct])).Q1, 0.98)
	return verdict{
		Goal:    "within noise of direct",
		Figure:  fmt.Sprintf("x%.2f, noise from x%.2f", ours, noise),
		Reached: ours >= noise,
	}
}

// atMost: Weir's median is limited.
func atMost(limit float64, unit string) func(row) verdict {
	return func(r row) verdict {
		ours := summarize(r.Samples[weir]).Median
		return verdict{
			Goal:    strings.TrimSpace(fmt.Sprintf("at most %g %s", limit, unit)),
			Figure:  strings.TrimSpace(number(ours) + " " + unit),
			Reached: ours <= limit,
		}
	}
}

// timesFaster: what is beside Weir takes so many times as long.
func timesFaster(times float64, than string) func(row) verdict {
	return func(r row) verdict {
		factor := summarize(r.Samples[consul]).Median / summarize(r.Samples[weir]).Median
		return verdict{
			Goal:    fmt.Sprintf("at least %g times faster than %s", times, than),
			Figure:  fmt.Sprintf("%.1f times", factor),
			Reached: factor >= times,
		}
	}
}
