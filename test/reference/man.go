// SPDX-License-Identifier: MPL-2.0

package reference

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cpuguy83/go-md2man/v2/md2man"
	"github.com/google/go-cmp/cmp"
)

// ManPage is one page of the manual, as Markdown whose headings of the first level are its
// sections.
type ManPage struct {
	Name    string
	Section int
	Text    string
}

// CheckMan compares the manual in dist/man with the pages: neither may have one more. With
// WEIR_UPDATE_DOCS set it writes them instead.
func CheckMan(t *testing.T, pages []ManPage) {
	t.Helper()
	dir := filepath.Join(root(t), "dist", "man")
	want := make(map[string]string)
	for _, page := range pages {
		// No date: the same sources give the same bytes.
		title := fmt.Sprintf("%% %q %q %q %q %q\n\n", strings.ToUpper(page.Name), fmt.Sprint(page.Section), "", "Weir", "Weir Manual")
		want[fmt.Sprintf("%s.%d", page.Name, page.Section)] = string(md2man.Render([]byte(title + page.Text)))
	}
	have := make(map[string]string)
	entries, err := os.ReadDir(dir)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for _, entry := range entries {
		text, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		if err != nil {
			t.Fatal(err)
		}
		have[entry.Name()] = string(text)
	}
	diff := cmp.Diff(want, have)
	if diff == "" {
		return
	}
	if os.Getenv("WEIR_UPDATE_DOCS") == "" {
		t.Errorf("dist/man is not what the code says (-want +have); run make generate:\n%s", diff)
		return
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // pages that everybody reads
		t.Fatal(err)
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(want[name]), 0o644); err != nil { //nolint:gosec // likewise
			t.Fatal(err)
		}
	}
}

// ManText is a section of a page of docs/, from below its heading to the next one of the
// same level, as a page of the manual has it: without links, and with tables as lists of
// definitions, since a terminal's line is short.
func ManText(t *testing.T, page, heading string) string {
	t.Helper()
	text, err := os.ReadFile(Page(t, page))
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(text), "\n## "+heading+"\n")
	if !found {
		t.Fatalf("docs/%s has no heading %q", page, heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	section = regexp.MustCompile(`(?m)^<!--.*-->\n`).ReplaceAllString(section, "")
	section = regexp.MustCompile(`\[([^\]]+)\]\([^)]*\)`).ReplaceAllString(section, "$1")
	return regexp.MustCompile(`(?m)(?:^\|.*\|\n)+`).ReplaceAllStringFunc(section, definitions)
}

// definitions turns a table into a list: a row's first cell is what is defined, the cell
// below "meaning" or "value", else the last, says it, and each other one follows it.
func definitions(table string) string {
	var list strings.Builder
	var head []string
	said := 0
	for i, line := range strings.Split(strings.TrimSpace(table), "\n") {
		cells := strings.Split(strings.ReplaceAll(strings.Trim(line, "| "), `\|`, "\x00"), "|")
		for j := range cells {
			cells[j] = strings.ReplaceAll(strings.TrimSpace(cells[j]), "\x00", "|")
		}
		switch i {
		case 0:
			head, said = cells, len(cells)-1
			if j := slices.IndexFunc(cells, func(c string) bool { return c == "meaning" || c == "value" }); j > 0 {
				said = j
			}
			continue
		case 1:
			continue
		}
		fmt.Fprintf(&list, "%s\n\n:   %s", cells[0], cells[said])
		for j := 1; j < len(cells); j++ {
			if j != said {
				fmt.Fprintf(&list, "; %s: %s", head[j], cells[j])
			}
		}
		list.WriteString("\n\n")
	}
	return list.String()
}
