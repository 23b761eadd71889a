// SPDX-License-Identifier: MPL-2.0

// Package reference keeps the tables of the documentation that are made from the code. A test makes
// a table and hands it to Check; "make generate" runs the same tests with WEIR_UPDATE_DOCS set.
package reference

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Check compares the text between the marks of one section in a page of docs/ with what the code
// makes of it, and fails where they differ. With WEIR_UPDATE_DOCS set it writes the page instead.
// The marks are lines: <!-- NAME:begin --> and <!-- NAME:end -->.
func Check(t *testing.T, page, name, want string) {
	t.Helper()
	path := Page(t, page)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	begin, end := fmt.Sprintf("<!-- %s:begin -->\n", name), fmt.Sprintf("<!-- %s:end -->", name)
	before, rest, found := strings.Cut(string(text), begin)
	have, after, closed := strings.Cut(rest, end)
	if !found || !closed {
		t.Fatalf("%s: want a section between %q and %q", path, strings.TrimSpace(begin), end)
	}
	want = strings.TrimRight(want, "\n") + "\n"
	if os.Getenv("WEIR_UPDATE_DOCS") != "" {
		updated := []byte(before + begin + want + end + after)
		if !bytes.Equal(updated, text) {
			if err := os.WriteFile(path, updated, 0o644); err != nil { //nolint:gosec // a page that everybody reads
				t.Fatal(err)
			}
		}
		return
	}
	if diff := cmp.Diff(want, have); diff != "" {
		t.Errorf("%s: section %s is not what the code says; run make generate:\n%s", path, name, diff)
	}
}

// Page is the path of a page of docs/. A test runs in the directory of its package.
func Page(t *testing.T, page string) string {
	t.Helper()
	return filepath.Join(root(t), "docs", page)
}

// root is the directory of the project.
func root(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for dir != filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		dir = filepath.Dir(dir)
	}
	t.Fatal("find the project: no go.mod above the working directory")
	return ""
}

// Table renders rows as a table of Markdown; the first row is the heading.
func Table(rows [][]string) string {
	var text strings.Builder
	for i, row := range rows {
		for _, cell := range row {
			text.WriteString("| " + strings.ReplaceAll(cell, "|", `\|`) + " ")
		}
		text.WriteString("|\n")
		if i == 0 {
			text.WriteString(strings.Repeat("|---", len(row)) + "|\n")
		}
	}
	return text.String()
}
