// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"errors"
	"regexp"
	"slices"
	"strings"
)

// mostAgain is how many tests of a kernel may have a second run. More is no accident of timing.
const mostAgain = 8

// again runs the tests that failed in an emulated guest once more, alone in a guest of their own:
// three guests on two processors keep a test waiting for longer than it allows. What passes then
// does not fail the kernel, but is named and counted; what fails again does.
func (r *run) again(ctx context.Context, k kernel, img image, tests []suiteOfTests, result *kernelResult) error {
	if r.accel != "tcg" || r.report || result.err != nil || !result.failed() {
		return nil
	}
	var second []suiteOfTests
	count := 0
	for i := range result.packages {
		p := &result.packages[i]
		names := p.failedTests()
		if len(p.complaints()) == 0 {
			continue
		}
		if len(names) == 0 || len(p.skipped) > 0 {
			return nil
		}
		count += len(names)
		for _, s := range tests {
			if modulePath+"/"+s.dir == p.name {
				s.run = "^(" + strings.Join(names, "|") + ")$"
				second = append(second, s)
			}
		}
	}
	if count > mostAgain {
		return nil
	}
	r.note("kernel %s: %d tests failed and run once more, alone", k.name, count)
	once, err := r.one(ctx, k, img, second)
	if err != nil {
		return err
	}
	if once.failed() {
		return nil
	}
	for i := range result.packages {
		result.packages[i].forgive()
	}
	return nil
}

// diedOfPatching reports whether a guest ended because a processor met a breakpoint that the kernel
// knew nothing of, as it puts where it patches its own code. Seen once, in a hook of netfilter under
// two emulated processors, which may see each other's code late; not by a program of Weir's, and
// never on KVM, where it stays a failure.
func diedOfPatching(failure error) bool {
	return errors.Is(failure, errDied) && strings.Contains(failure.Error(), "Oops: int3")
}

// failedTests are the names of the failed tests without their subtests.
func (r *packageResult) failedTests() []string {
	var names []string
	for _, name := range r.failed {
		if !strings.Contains(name, "/") {
			names = append(names, regexp.QuoteMeta(name))
		}
	}
	slices.Sort(names)
	return names
}

// forgive takes the failures for an accident of timing.
func (r *packageResult) forgive() {
	if len(r.failed) == 0 {
		return
	}
	r.second, r.failed = append(r.second, r.failed...), nil
	r.passed = append(r.passed, r.second...)
	if r.exit != nil {
		r.exit.Status = 0
	}
}
