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

// addedCost: of what iptables adds Weir adds at most a share, and at most so many
// times as much as the limit; 0 times: that is told, not asked for.
func addedCost(share, times float64) func(row) verdict {
	return func(r row) verdict {
		added := func(variant string) float64 {
			return summarize(differences(r.Samples[variant], r.Samples[direct])).Median
		}
		ours, theirs, possible := added(weir), added(consul), added(least)
		v := verdict{
			Goal:    fmt.Sprintf("added at most %g of iptables-nft's", share),
			Figure:  fmt.Sprintf("%+.1f to %+.1f %s, %.2f", ours, theirs, r.Unit, ours/theirs),
			Reached: theirs > 0 && ours <= share*theirs,
		}
		// A limit that is lost in the noise proves nothing either way.
		if possible > 0 {
			v.Figure += fmt.Sprintf("; %.1f times the limit", ours/possible)
		}
		if times > 0 {
			v.Goal += fmt.Sprintf(", %g times the limit's", times)
			v.Reached = v.Reached && possible > 0 && ours <= times*possible
		}
		return v
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

// atMostTimes: one variant takes at most so many times as much as another, by the median
// of the ratios of the rounds.
func atMostTimes(limit float64, variant, other string) func(row) verdict {
	return func(r row) verdict {
		ratio := summarize(ratios(r.Samples[variant], r.Samples[other])).Median
		return verdict{
			Goal:    fmt.Sprintf("at most %g of %s", limit, other),
			Figure:  fmt.Sprintf("x%.3f", ratio),
			Reached: ratio <= limit,
		}
	}
}

// shareOf: Weir takes at most a share of what another variant takes.
func shareOf(share float64, other string) func(row) verdict {
	return func(r row) verdict {
		ratio := summarize(r.Samples[weir]).Median / summarize(r.Samples[other]).Median
		return verdict{
			Goal:    fmt.Sprintf("at most %g of %s", share, other),
			Figure:  fmt.Sprintf("%.2f", ratio),
			Reached: ratio <= share,
		}
	}
}

// fasterThanChains: the reference plugins take ten times as long with Consul's
// iptables engine at their end, five times as long with its nftables engine.
func fasterThanChains(r row) verdict {
	ours := summarize(r.Samples[weir]).Median
	first, second := summarize(r.Samples[consul]).Median/ours, summarize(r.Samples[nftables]).Median/ours
	return verdict{
		Goal:    "at least 10 times faster than iptables-nft, 5 than nftables",
		Figure:  fmt.Sprintf("%.1f and %.1f times", first, second),
		Reached: first >= 10 && second >= 5,
	}
}
