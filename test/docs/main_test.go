// SPDX-License-Identifier: MPL-2.0

package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestLinksThatLeadNowhereAreFound(t *testing.T) {
	dir := t.TempDir()
	page := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	page("other.md", "# Other page\n\n## What `x` does, and why\n\n## Twice\n\n## Twice\n\n```\n# no heading\n```\n")
	page("data.json", "{}")
	from := page("page.md", `[good](other.md) [heading](other.md#what-x-does-and-why) [second](other.md#twice-1) [own](#top)
[data](data.json) [elsewhere](https://example.com/x#y)
[gone](missing.md) [wrong](other.md#what-x-does) [comment](other.md#no-heading)

`+"```\n[in code](missing-too.md)\n```\n\n# Top\n")
	want := []string{
		from + ": link missing.md: no such page",
		from + ": link other.md#what-x-does: no such heading",
		from + ": link other.md#no-heading: no such heading",
	}
	if diff := cmp.Diff(want, check([]string{from}, nil)); diff != "" {
		t.Error(diff)
	}
}

func TestTestsThatAreNotThereAreFound(t *testing.T) {
	dir := t.TempDir()
	from := filepath.Join(dir, "page.md")
	for path, text := range map[string]string{
		"page.md":           "`TestHere`, `TestHere/a part`, `BenchmarkHere`, `TestGone`, `TestHidden`, Testing, `TestHer`\n\n```\n`TestInCode`\n```\n",
		"below/a_test.go":   "package a\n\nfunc TestHere(t *testing.T) {}\n\nfunc BenchmarkHere(b *testing.B) {}\n",
		"below/a.go":        "package a\n\nfunc TestGone(t *testing.T) {}\n",
		".hidden/a_test.go": "package a\n\nfunc TestHidden(t *testing.T) {}\n",
	} {
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tests, err := testsBelow(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{from + ": TestGone: no such test", from + ": TestHidden: no such test", from + ": TestHer: no such test"}
	if diff := cmp.Diff(want, check([]string{from}, tests)); diff != "" {
		t.Error(diff)
	}
}
