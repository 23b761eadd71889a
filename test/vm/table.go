// SPDX-License-Identifier: MPL-2.0

package main

// The measurement of the programs is a test of package redirect, which prints a line for each
// program when reportEnv is set.
const (
	reportSuite = "redirect"
	reportTest  = "^TestReport$"
	reportEnv   = "WEIR_TEST_REPORT"
	reportMark  = "REPORT "
)

func writeTable(readme string, chosen []kernel, results []kernelResult) error { return nil }
