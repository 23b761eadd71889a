// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/cli"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/test/reference"
)

// TestReferenceOfCommands holds docs/cli.md to what each command says of itself.
func TestReferenceOfCommands(t *testing.T) {
	list := commands(base.Env{Ctx: context.Background(), UI: cli.NewMockUi(), Getenv: func(string) string { return "" }})
	var text strings.Builder
	rows := [][]string{{"command", "what it does"}}
	for _, name := range slices.Sorted(maps.Keys(list)) {
		command, err := list[name]()
		if err != nil {
			t.Fatal(err)
		}
		rows = append(rows, []string{fmt.Sprintf("[`weir %s`](#weir-%s)", name, strings.ReplaceAll(name, " ", "-")), command.Synopsis()})
		fmt.Fprintf(&text, "\n## weir %s\n\n```\n%s\n```\n", name, command.Help())
	}
	reference.Check(t, "cli.md", "commands", reference.Table(rows)+text.String())
}

// TestReferenceOfTheRunbook wants a heading of docs/runbook.md for all that an operator may be shown.
func TestReferenceOfTheRunbook(t *testing.T) {
	text, err := os.ReadFile(reference.Page(t, "runbook.md"))
	if err != nil {
		t.Fatal(err)
	}
	headings := make(map[string]bool)
	for _, found := range regexp.MustCompile(`(?m)^### (.+)$`).FindAllStringSubmatch(string(text), -1) {
		headings[found[1]] = true
	}
	var wanted []string
	rows := [][]string{{"code", "severity", "what is wrong"}}
	for _, verdict := range bpfmap.AllVerdicts() {
		wanted = append(wanted, verdict.String())
	}
	for _, code := range health.AllProblemCodes() {
		wanted = append(wanted, code.String())
		rows = append(rows, []string{fmt.Sprintf("[`%s`](#%s)", code, code), string(code.Severity()), code.Title()})
	}
	reference.Check(t, "runbook.md", "problems", reference.Table(rows))
	source, err := os.ReadFile("../../cni/errors.go")
	if err != nil {
		t.Fatal(err)
	}
	codes := regexp.MustCompile(`(?m)^\tCode\w+ uint = (\d+)$`).FindAllStringSubmatch(string(source), -1)
	if len(codes) < 7 {
		t.Fatalf("cni/errors.go: found the codes %v: fewer than there are", codes)
	}
	for _, code := range codes {
		wanted = append(wanted, "Code "+code[1])
	}
	wanted = append(wanted, codesOfChecks(t)...)
	for _, heading := range wanted {
		if !headings[heading] {
			t.Errorf("docs/runbook.md: no heading %q", heading)
		}
	}
}

// codesOfChecks are all codes that "weir doctor" may show.
func codesOfChecks(t *testing.T) (codes []string) {
	t.Helper()
	for _, path := range []string{"../../redirect/inspect/readiness.go", "../../agent/readiness/readiness.go", "../../agent/catalog/preflight/preflight.go", "../../deploy/readiness.go", "maintain/doctor.go"} {
		source, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		before := len(codes)
		for _, found := range regexp.MustCompile(`\.(?:OK|Warn|Fault|Version)\("([a-z-]+)", `).FindAllStringSubmatch(string(source), -1) {
			if !slices.Contains(codes, found[1]) {
				codes = append(codes, found[1])
			}
		}
		if len(codes) == before {
			t.Errorf("%s: no code of a check is found there", path)
		}
	}
	return codes
}
