// SPDX-License-Identifier: MPL-2.0

package test

import (
	"os"
	"testing"
)

// WriteFile writes a file that only its owner may read, and returns its path.
func WriteFile(tb testing.TB, path, text string) string {
	tb.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		tb.Fatal(err)
	}
	return path
}

// OpenFiles counts the descriptors of this process, its own look at them included.
func OpenFiles(tb testing.TB) int {
	tb.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	return len(entries)
}
