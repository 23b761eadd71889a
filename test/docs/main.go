// SPDX-License-Identifier: MPL-2.0

// Command docs checks that each link between the pages of the documentation leads to a page, and
// to a heading of it, that exist, and that each test, each file and each function of a file which a
// page names is there. Its arguments are the pages; the tests and files are those of the working
// directory and below.
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

func main() {
	tests, err := testsBelow(".")
	if err != nil {
		fmt.Fprintln(os.Stderr, "test/docs:", err)
		os.Exit(1)
	}
	problems := check(os.Args[1:], tests)
	for _, problem := range problems {
		fmt.Println(problem)
	}
	if len(problems) > 0 {
		os.Exit(1)
	}
}

// check returns a line for each link of the pages that leads nowhere, and for each test, file and
// function that is named and not there.
func check(pages []string, tests map[string]bool) (problems []string) {
	anchorsOf := make(map[string]map[string]bool) // by path; nil where the file is no page
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			problems = append(problems, fmt.Sprintf("read page: %v", err))
			continue
		}
		for _, link := range links(string(text)) {
			if err := resolve(page, link, anchorsOf); err != nil {
				problems = append(problems, fmt.Sprintf("%s: link %s: %v", page, link, err))
			}
		}
		for _, name := range namedTests(string(text)) {
			if !tests[name] {
				problems = append(problems, fmt.Sprintf("%s: %s: no such test", page, name))
			}
		}
		for _, named := range namedSources(string(text)) {
			if err := named.find(filepath.Dir(page)); err != nil {
				problems = append(problems, fmt.Sprintf("%s: %v", page, err))
			}
		}
	}
	return problems
}

// resolve follows a link relative to the page that has it.
func resolve(page, link string, anchorsOf map[string]map[string]bool) error {
	if strings.Contains(link, "://") || strings.HasPrefix(link, "mailto:") {
		return nil
	}
	target, anchor, _ := strings.Cut(link, "#")
	path := page
	if target != "" {
		path = filepath.Join(filepath.Dir(page), target)
	}
	anchors, known := anchorsOf[path]
	if !known {
		text, err := os.ReadFile(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return errors.New("no such page")
		case err == nil && strings.HasSuffix(path, ".md"):
			anchors = anchorsIn(string(text))
		}
		anchorsOf[path] = anchors
	}
	if anchor != "" && !anchors[anchor] {
		return errors.New("no such heading")
	}
	return nil
}

// prose is the page's lines outside of code blocks.
func prose(text string) (lines []string) {
	code := false
	for line := range strings.SplitSeq(text, "\n") {
		if strings.HasPrefix(strings.TrimSpace(line), "```") {
			code = !code
		} else if !code {
			lines = append(lines, line)
		}
	}
	return lines
}

func links(text string) (targets []string) {
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	for _, found := range link.FindAllStringSubmatch(strings.Join(prose(text), "\n"), -1) {
		targets = append(targets, found[1])
	}
	return targets
}

// namedTests are the tests and benchmarks that the page names, without their parts.
func namedTests(text string) (names []string) {
	named := regexp.MustCompile("`((?:Test|Benchmark|Fuzz)[A-Z]\\w*)[`/]")
	for _, found := range named.FindAllStringSubmatch(strings.Join(prose(text), "\n"), -1) {
		names = append(names, found[1])
	}
	return names
}

// source is a file that a page names, from the root of the repository or from beside the page, and
// the function of it that the page names behind it, if any.
type source struct{ file, function string }

func namedSources(text string) (list []source) {
	named := regexp.MustCompile("`([\\w-][\\w./-]*\\.(?:go|c|h|sh|txtar|md))`(?:\\s`(\\w+)`)?")
	for _, found := range named.FindAllStringSubmatch(strings.Join(prose(text), "\n"), -1) {
		list = append(list, source{found[1], found[2]})
	}
	return list
}

// find tells whether the function is declared, in Go or in C, in the file.
func (s source) find(beside string) error {
	text, err := os.ReadFile(s.file)
	if errors.Is(err, fs.ErrNotExist) {
		text, err = os.ReadFile(filepath.Join(beside, s.file))
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s: no such file", s.file)
	case err != nil || s.function == "":
		return err
	}
	declared := regexp.MustCompile(`(?m)^(?:func (?:\([^)]*\) )?|[a-z_][\w *]* \*?)` + s.function + `[(\[]`)
	if !declared.Match(text) {
		return fmt.Errorf("%s: no function %s", s.file, s.function)
	}
	return nil
}

// testsBelow are the tests and benchmarks of a directory and those below it that are not hidden.
func testsBelow(root string) (map[string]bool, error) {
	declared := regexp.MustCompile(`(?m)^func ((?:Test|Benchmark|Fuzz)\w+)\(`)
	tests := make(map[string]bool)
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && path != root && strings.HasPrefix(entry.Name(), "."):
			return filepath.SkipDir
		case entry.IsDir() || !strings.HasSuffix(path, "_test.go"):
			return nil
		}
		text, err := os.ReadFile(path)
		for _, found := range declared.FindAllSubmatch(text, -1) {
			tests[string(found[1])] = true
		}
		return err
	})
	return tests, err
}

// anchorsIn are the anchors that GitHub gives to a page's headings: lower case,
// punctuation gone, spaces as hyphens, a number behind one that was there before.
func anchorsIn(text string) map[string]bool {
	anchors := make(map[string]bool)
	dropped := regexp.MustCompile(`[^\p{L}\p{N}_ -]`)
	for _, line := range prose(text) {
		level := strings.IndexFunc(line, func(r rune) bool { return r != '#' })
		if level < 1 || level > 6 || line[level] != ' ' {
			continue
		}
		name := strings.ReplaceAll(dropped.ReplaceAllString(strings.ToLower(strings.TrimSpace(line[level:])), ""), " ", "-")
		anchor := name
		for n := 1; anchors[anchor]; n++ {
			anchor = fmt.Sprintf("%s-%d", name, n)
		}
		anchors[anchor] = true
	}
	return anchors
}
