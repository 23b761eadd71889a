// SPDX-License-Identifier: MPL-2.0

package main

import (
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
