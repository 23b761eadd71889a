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

func TestSourcesThatAreNotThereAreFound(t *testing.T) {
	dir := t.TempDir()
	from := filepath.Join(dir, "docs", "page.md")
	for path, text := range map[string]string{
		"docs/page.md": "`a/a.go` `Run`, `a/a.go` `helper` and `a/a.go`\n`Made`: `b.c` `weir_x`, `b.c` `inner`; `beside.sh`, `/etc/x.sh`, `*.go`, `of.json`\n" +
			"`a/a.go` `Called`, `b.c` `called`, `gone.h`, `a/gone.go` `Run`\n\n```\n`gone.c`\n```\n",
		"docs/beside.sh": "",
		"a/a.go":         "package a\n\nfunc (r *Runner) Run() { Called() }\n\nfunc helper() {}\n\nfunc Made[T any]() {}\n",
		"b.c":            "int weir_x(int y)\n{\n\treturn called(y);\n}\nstatic __always_inline struct y *inner(void)\n{\n}\n",
	} {
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	want := []string{
		from + ": a/a.go: no function Called", from + ": b.c: no function called",
		from + ": gone.h: no such file", from + ": a/gone.go: no such file",
	}
	if diff := cmp.Diff(want, check([]string{from}, nil)); diff != "" {
		t.Error(diff)
	}
}
