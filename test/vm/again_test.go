// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestForgive(t *testing.T) {
	r := packageResult{
		passed: []string{"TestA"}, failed: []string{"TestB/case_1", "TestB", "TestC"},
		tests: 3, subtests: 1, exit: &guestExit{Status: 1},
	}
	if diff := cmp.Diff([]string{"TestB", "TestC"}, r.failedTests()); diff != "" {
		t.Errorf("tests to run again (-want +got):\n%s", diff)
	}
	if len(r.complaints()) == 0 {
		t.Error("no complaint about failures")
	}
	r.forgive()
	if why := r.complaints(); len(why) > 0 {
		t.Errorf("complaints after a second run: %v", why)
	}
	if diff := cmp.Diff([]string{"TestB/case_1", "TestB", "TestC"}, r.second); diff != "" {
		t.Errorf("told as passed at a second run (-want +got):\n%s", diff)
	}
}

func TestDiedOfPatching(t *testing.T) {
	complains := func(line string) error { return errors.New("the kernel complains: " + line) }
	for name, tc := range map[string]struct {
		failure error
		want    bool
	}{
		"a breakpoint of nobody's":        {errors.Join(errDied, complains("[  301.1] Oops: int3: 0000 [#1] PREEMPT SMP")), true},
		"another fault":                   {errors.Join(errDied, complains("[  301.1] Oops: general protection fault")), false},
		"one that it lived through":       {complains("[  301.1] Oops: int3: 0000 [#1] PREEMPT SMP"), false},
		"an end of which nothing is told": {errDied, false},
		"none":                            {nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := diedOfPatching(tc.failure); got != tc.want {
				t.Errorf("diedOfPatching(%v) = %t, want %t", tc.failure, got, tc.want)
			}
		})
	}
}
