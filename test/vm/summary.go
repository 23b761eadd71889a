// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

func (r *kernelResult) failed() bool {
	if r.err != nil {
		return true
	}
	for _, p := range r.packages {
		if len(p.complaints()) > 0 {
			return true
		}
	}
	return len(r.packages) == 0
}

// summarize prints one line per kernel and fails when one failed.
func summarize(w io.Writer, chosen []kernel, results []kernelResult) error {
	fmt.Fprintln(w)
	var failed []string
	for i, k := range chosen {
		r := &results[i]
		var tests, subtests, skipped, bad, second int
		for _, p := range r.packages {
			tests, subtests, skipped, bad = tests+p.tests, subtests+p.subtests, skipped+len(p.skipped), bad+len(p.failed)
			second += len(p.second)
		}
		verdict := "ok  "
		if r.failed() {
			verdict = "FAIL"
			failed = append(failed, k.name)
		}
		what := "tests"
		if k.refuse {
			what = "tests of the refusal"
		}
		fmt.Fprintf(w, "%s\tkernel %-7s %-28s %3d %s, %d subtests, %d failed, %d skipped, %d at a second run\t%.0fs\n",
			verdict, k.name, r.image.release, tests, what, subtests, bad, skipped, second, r.took.Seconds())
	}
	if len(failed) > 0 {
		return errors.New("failed on " + strings.Join(failed, ", "))
	}
	return nil
}

// tail copies the last lines of a file.
func tail(w io.Writer, file string, n int) {
	text, err := os.ReadFile(file)
	if err != nil {
		fmt.Fprintf(w, "    no console log: %v\n", err)
		return
	}
	lines := strings.Split(strings.TrimRight(string(text), "\r\n"), "\n")
	for _, line := range lines[max(0, len(lines)-n):] {
		fmt.Fprintf(w, "    | %s\n", strings.TrimRight(line, "\r"))
	}
}
