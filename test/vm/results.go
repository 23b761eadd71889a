// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os/exec"
	"slices"
	"strings"
)

// event is a line of go tool test2json.
type event struct {
	Action, Test, Output string
}

// packageResult is what one test binary did in one guest.
type packageResult struct {
	name            string
	passed, failed  []string // tests and subtests
	skipped         []string
	second          []string          // of passed: failed at first, and passed alone
	tests, subtests int               // that ran
	filtered        bool              // by -run: nothing to run is no failure
	exit            *guestExit        // nil where the guest did not tell the end
	output          map[string]string // by test; "" is the binary's own
}

// readResult turns the output of a test binary into a result. The binary ran with -test.v=test2json.
func readResult(ctx context.Context, name string, output []byte, exit *guestExit, filtered bool) (packageResult, error) {
	cmd := exec.CommandContext(ctx, "go", "tool", "test2json", "-p", name)
	cmd.Stdin = bytes.NewReader(output)
	lines, err := cmd.Output()
	if err != nil {
		return packageResult{}, fmt.Errorf("read results of %s: %w", name, err)
	}
	r := packageResult{name: name, exit: exit, filtered: filtered, output: map[string]string{}}
	for events := json.NewDecoder(bytes.NewReader(lines)); ; {
		var e event
		if err := events.Decode(&e); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return packageResult{}, fmt.Errorf("read results of %s: %w", name, err)
		}
		r.add(e)
	}
	return r, nil
}

func (r *packageResult) add(e event) {
	switch e.Action {
	case "output":
		r.output[e.Test] += e.Output
		return
	case "run":
		if strings.Contains(e.Test, "/") {
			r.subtests++
		} else {
			r.tests++
		}
		return
	}
	if e.Test == "" {
		return
	}
	switch e.Action {
	case "pass":
		r.passed = append(r.passed, e.Test)
	case "fail":
		r.failed = append(r.failed, e.Test)
	case "skip":
		r.skipped = append(r.skipped, e.Test)
	}
}

// complaints are the reasons for which the package did not pass: a skip is one, and so is having run nothing.
func (r *packageResult) complaints() []string {
	var why []string
	if len(r.failed) > 0 {
		why = append(why, fmt.Sprintf("%d failed", len(r.failed)))
	}
	if len(r.skipped) > 0 {
		why = append(why, fmt.Sprintf("%d skipped", len(r.skipped)))
	}
	if ended := len(r.passed) + len(r.failed) + len(r.skipped); ended < r.tests+r.subtests {
		why = append(why, fmt.Sprintf("%d without a result", r.tests+r.subtests-ended))
	}
	switch {
	case r.exit == nil:
		why = append(why, "did not finish")
	case r.exit.Status != 0 && len(r.failed) == 0:
		why = append(why, fmt.Sprintf("exit status %d", r.exit.Status))
	case r.tests == 0 && !r.filtered:
		why = append(why, "no test ran")
	}
	return why
}

// print writes the result as go test does, with the number of tests; output of what passed is left out.
func (r *packageResult) print(w io.Writer) {
	count, took := fmt.Sprintf("%d tests, %d subtests", r.tests, r.subtests), "?"
	if r.exit != nil {
		took = fmt.Sprintf("%.1fs", r.exit.Took.Seconds())
	}
	why := r.complaints()
	if len(why) == 0 {
		fmt.Fprintf(w, "ok  \t%s\t%s\t%s\n", r.name, took, count)
		return
	}
	good := map[string]bool{}
	for _, name := range r.passed {
		good[name] = true
	}
	for _, name := range slices.Sorted(maps.Keys(r.output)) {
		if name != "" && !good[name] {
			fmt.Fprint(w, r.output[name])
		}
	}
	fmt.Fprint(w, r.output[""])
	fmt.Fprintf(w, "FAIL\t%s\t%s\t%s (%s)\n", r.name, took, strings.Join(why, ", "), count)
}
