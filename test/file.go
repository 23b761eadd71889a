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
