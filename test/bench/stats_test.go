// SPDX-License-Identifier: MPL-2.0

package main

import (
	"math"
	"slices"
	"testing"
)

func TestSummarize(t *testing.T) {
	for _, test := range []struct {
		name    string
		samples []float64
		want    summary
	}{
		{"one sample is its own quartiles", []float64{7}, summary{7, 7, 7, 1}},
		{"an even count interpolates", []float64{4, 1, 3, 2}, summary{2.5, 1.75, 3.25, 4}},
		{"an outlier does not move the median", []float64{1, 2, 3, 4, 1000}, summary{3, 2, 4, 5}},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := slices.Clone(test.samples)
			if got := summarize(test.samples); got != test.want {
				t.Errorf("summarize(%v) = %+v, want %+v", test.samples, got, test.want)
			}
			if !slices.Equal(test.samples, before) {
				t.Errorf("summarize reordered its argument: %v", test.samples)
			}
		})
	}
}

func TestSummarizeNothing(t *testing.T) {
	if got := summarize(nil); !math.IsNaN(got.Median) || got.N != 0 {
		t.Errorf("summarize(nil) = %+v, want NaN of 0 samples", got)
	}
}

func TestPairsStayInTheirRound(t *testing.T) {
	slow, floor := []float64{20, 30, 50}, []float64{10, 10, 25}
	if got, want := ratios(slow, floor), []float64{2, 3, 2}; !slices.Equal(got, want) {
		t.Errorf("ratios = %v, want %v", got, want)
	}
	if got, want := differences(slow, floor), []float64{10, 20, 25}; !slices.Equal(got, want) {
		t.Errorf("differences = %v, want %v", got, want)
	}
	if got := ratios(slow, floor[:1]); len(got) != 1 {
		t.Errorf("ratios of 3 and 1 rounds = %v, want the one round that both have", got)
	}
}
