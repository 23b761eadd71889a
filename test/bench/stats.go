// SPDX-License-Identifier: MPL-2.0

package main

import (
	"math"
	"slices"
)

// A summary is what is kept of one variant's samples.
type summary struct {
	Median float64 `json:"median"`
	Q1     float64 `json:"q1"`
	Q3     float64 `json:"q3"`
	N      int     `json:"n"`
}

// summarize gives the median and the quartiles. It leaves samples as they are;
// without samples every figure is NaN.
func summarize(samples []float64) summary {
	ordered := slices.Sorted(slices.Values(samples))
	return summary{
		Median: quantile(ordered, 0.5),
		Q1:     quantile(ordered, 0.25),
		Q3:     quantile(ordered, 0.75),
		N:      len(ordered),
	}
}

// quantile interpolates between the two nearest ranks of an ordered list.
func quantile(ordered []float64, q float64) float64 {
	if len(ordered) == 0 {
		return math.NaN()
	}
	rank := q * float64(len(ordered)-1)
	low := int(math.Floor(rank))
	high := min(low+1, len(ordered)-1)
	return ordered[low] + (rank-float64(low))*(ordered[high]-ordered[low])
}

// ratios divides round by round, so that what the machine did in one round
// cancels out.
func ratios(samples, floor []float64) []float64 {
	return pairs(samples, floor, func(a, b float64) float64 { return a / b })
}

// differences subtracts round by round.
func differences(samples, floor []float64) []float64 {
	return pairs(samples, floor, func(a, b float64) float64 { return a - b })
}

func pairs(a, b []float64, combine func(a, b float64) float64) []float64 {
	n := min(len(a), len(b))
	out := make([]float64, n)
	for i := range n {
		out[i] = combine(a[i], b[i])
	}
	return out
}
