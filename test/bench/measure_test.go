// SPDX-License-Identifier: MPL-2.0

package main

import (
	"net/netip"
	"testing"
)

func TestCheckOrigins(t *testing.T) {
	origin := netip.MustParseAddrPort("198.51.100.10:8080")
	for _, test := range []struct {
		name       string
		served     serveReport
		redirected bool
		ok         bool
	}{
		{"all right", serveReport{Right: 3}, true, true},
		{"one wrong", serveReport{Right: 2, Wrong: 1}, true, false},
		{"one without", serveReport{Right: 2, None: 1}, true, false},
		{"no connection proves nothing", serveReport{}, true, false},
		{"the floor has none", serveReport{None: 3}, false, true},
		{"the floor is redirected", serveReport{None: 2, Right: 1}, false, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := checkOrigins(test.served, origin, test.redirected); (err == nil) != test.ok {
				t.Errorf("checkOrigins = %v, want ok = %t", err, test.ok)
			}
		})
	}
}

func TestSockaddrNamesTheSameAddress(t *testing.T) {
	want := netip.MustParseAddrPort("198.51.100.10:8080")
	if got := nameOf(sockaddr(want)); got != want {
		t.Errorf("nameOf(sockaddr(%s)) = %s", want, got)
	}
}

func TestQuickMeasuresTheSameRows(t *testing.T) {
	rows := func(size sizes) (ids []string) {
		b := &bench{size: size, cpus: []int{0}}
		all := append(b.traffic(), b.setups()...)
		for _, m := range append(all, b.memory(), b.unrelated()) {
			for _, row := range m.rows {
				ids = append(ids, row.ID)
			}
		}
		return ids
	}
	full, quick := rows(fullSizes(21)), rows(quickSizes(2))
	if len(full) != len(quick) {
		t.Errorf("full run has rows %v, quick run %v", full, quick)
	}
	seen := map[string]bool{}
	for _, id := range full {
		if seen[id] {
			t.Errorf("two rows have the ID %s", id)
		}
		seen[id] = true
	}
}
