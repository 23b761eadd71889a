// SPDX-License-Identifier: MPL-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestTargets(t *testing.T) {
	for _, test := range []struct {
		name    string
		target  func(row) verdict
		samples map[string][]float64
		reached bool
		figure  string
	}{
		{
			"the share of the added cost is reached", addedCost(0.2, 0),
			map[string][]float64{direct: {10, 30}, weir: {12, 32}, consul: {20, 40}},
			true, "+2.0 to +10.0 us, 0.20",
		},
		{
			"more than the share is not", addedCost(0.2, 0),
			map[string][]float64{direct: {10, 30}, weir: {13, 33}, consul: {20, 40}},
			false, "+3.0 to +10.0 us, 0.30",
		},
		{
			"nothing is proved when iptables adds nothing", addedCost(0.2, 0),
			map[string][]float64{direct: {10}, weir: {9}, consul: {10}},
			false, "",
		},
		{
			"twice the limit is reached", addedCost(0.2, 2),
			map[string][]float64{direct: {10}, least: {11}, weir: {12}, consul: {20}},
			true, "+2.0 to +10.0 us, 0.20; 2.0 times the limit",
		},
		{
			"the share is reached, twice the limit is not", addedCost(0.2, 2),
			map[string][]float64{direct: {10}, least: {10.5}, weir: {12}, consul: {20}},
			false, "0.20; 4.0 times the limit",
		},
		{
			"a limit within the noise proves nothing", addedCost(0.2, 2),
			map[string][]float64{direct: {10}, least: {10}, weir: {11}, consul: {20}},
			false, "+1.0 to +10.0 us, 0.10",
		},
		{
			"inside the floor's own noise", asTheFloor,
			map[string][]float64{direct: {100, 100, 100}, directAgain: {90, 90, 110}, weir: {91, 91, 91}},
			true, "x0.91, noise from x0.90",
		},
		{
			"a quiet machine still leaves two percent", asTheFloor,
			map[string][]float64{direct: {100}, directAgain: {100}, weir: {97}},
			false, "x0.97, noise from x0.98",
		},
		{
			"at the limit", atMost(1.5, "ms"),
			map[string][]float64{weir: {1.5}}, true, "1.50 ms",
		},
		{
			"over the limit", atMost(1.5, "ms"),
			map[string][]float64{weir: {1.6}}, false, "1.60 ms",
		},
		{
			"three percent more, by the rounds' own ratios", atMostTimes(1.03, recorded, weir),
			map[string][]float64{weir: {10, 20, 40}, recorded: {10.3, 20.6, 80}}, true, "x1.030",
		},
		{
			"four percent more", atMostTimes(1.03, recorded, weir),
			map[string][]float64{weir: {10}, recorded: {10.4}}, false, "x1.040",
		},
		{
			"a share of the other", shareOf(0.4, inProcess),
			map[string][]float64{weir: {4}, inProcess: {10}, nftables: {5}},
			true, "0.40",
		},
		{
			"more than the share of the other", shareOf(0.4, nftables),
			map[string][]float64{weir: {5}, nftables: {10}},
			false, "0.50",
		},
		{
			"faster than both chains", fasterThanChains,
			map[string][]float64{weir: {4}, consul: {60}, nftables: {20}},
			true, "15.0 and 5.0 times",
		},
		{
			"not fast enough beside the first", fasterThanChains,
			map[string][]float64{weir: {4}, consul: {36}, nftables: {20}},
			false, "9.0 and 5.0 times",
		},
		{
			"not fast enough beside the second", fasterThanChains,
			map[string][]float64{weir: {4}, consul: {60}, nftables: {16}},
			false, "15.0 and 4.0 times",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := test.target(row{Unit: "us", Samples: test.samples})
			if got.Reached != test.reached {
				t.Errorf("reached = %t, want %t (%s)", got.Reached, test.reached, got.Figure)
			}
			if !strings.Contains(got.Figure, test.figure) {
				t.Errorf("figure = %q, want %q", got.Figure, test.figure)
			}
		})
	}
}

func TestMarkdownShowsEveryRow(t *testing.T) {
	rows := []row{
		{
			ID: "a", Name: "connect p50", Unit: "us", Floor: direct, target: addedCost(0.2, 0),
			Samples: map[string][]float64{direct: {10, 20}, directAgain: {11, 21}, weir: {11, 21}, consul: {20, 30}},
		},
		{ID: "b", Name: "set-up", Unit: "ms", Samples: map[string][]float64{weir: {1}, consul: {50}}},
	}
	var out strings.Builder
	if err := newReport(machine{CPU: "test CPU"}, false, rows).markdown(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| connect p50 | 15.0 us [12.5-17.5] | 16.0 us, x1.08 [1.06-1.09] |",
		"| added at most 0.2 of iptables-nft's | **yes**: +1.0 to +10.0 us, 0.10 |",
		"| set-up |  |  | 1 ms | 50.0 ms | | |",
		"test CPU",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("markdown lacks %q:\n%s", want, out.String())
		}
	}
}

func TestChoose(t *testing.T) {
	all := []part{
		{name: "bench", measurements: []measurement{{name: "connect"}, {name: "churn"}, {name: "memory"}}},
		{name: "bench-agent", measurements: []measurement{{name: "agent"}}},
	}
	for _, test := range []struct{ only, want string }{
		{"", "bench: connect churn memory; bench-agent: agent"},
		{"memory,connect", "bench: connect memory"},
		{"agent", "bench-agent: agent"},
		{"agent,churn", "bench: churn; bench-agent: agent"},
	} {
		chosen, err := choose(all, test.only)
		if err != nil {
			t.Errorf("choose %q: %v", test.only, err)
		}
		var got []string
		for _, p := range chosen {
			names := p.name + ":"
			for _, m := range p.measurements {
				names += " " + m.name
			}
			got = append(got, names)
		}
		if strings.Join(got, "; ") != test.want {
			t.Errorf("choose %q = %s, want %s", test.only, strings.Join(got, "; "), test.want)
		}
	}
	if _, err := choose(all, "memroy"); err == nil {
		t.Error("choose accepted a name that nothing has")
	}
}

func TestReplaceBetween(t *testing.T) {
	file := filepath.Join(t.TempDir(), "page.md")
	if err := os.WriteFile(file, []byte("before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := replaceBetween(file, "<!-- a:begin -->\n", "<!-- a:end -->", "new\n"); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(file)
	if want := "before\n<!-- a:begin -->\nnew\n<!-- a:end -->\nafter\n"; err != nil || string(got) != want {
		t.Errorf("file = %q, %v, want %q", got, err, want)
	}
	if err := replaceBetween(file, "<!-- b:begin -->\n", "<!-- b:end -->", "new\n"); err == nil {
		t.Error("a table went into a file without its marks")
	}
}
