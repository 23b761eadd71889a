// SPDX-License-Identifier: MPL-2.0

package main

import (
	"testing"

	"github.com/hashicorp/cli"
	"github.com/weirmesh/weir/cmd/weir/base"
)

// A task may be called anything; what it is called must not write over the screen.
func TestOnlyPrintableTextIsPrinted(t *testing.T) {
	for text, want := range map[string]string{
		"a\tb\nc ü ✓":                        "a\tb\nc ü ✓",
		"\x1b[31mred\x1b[0m \x1b[1m!\x1b[0m": "\x1b[31mred\x1b[0m \x1b[1m!\x1b[0m",
		"evil\x1b[2J\x1b[1;1Hhealthy":        `evil\x1b[2J\x1b[1;1Hhealthy`,
		"title\x1b]0;x\a":                    `title\x1b]0;x\a`,
		"back\b\b\b\b\r":                     `back\b\b\b\b\r`,
		"c1 \u009b2J, bidi \u202e":           `c1 \u009b2J, bidi \u202e`,
	} {
		ui := cli.NewMockUi()
		base.Printable{Ui: ui}.Output(text)
		if got := ui.OutputWriter.String(); got != want+"\n" {
			t.Errorf("%q is printed as %q, want %q", text, got, want)
		}
		base.Printable{Ui: ui}.Error(text)
		if got := ui.ErrorWriter.String(); got != want+"\n" {
			t.Errorf("%q is an error printed as %q, want %q", text, got, want)
		}
	}
	if got, want := base.Table("", [][]string{{"A", "B"}, {"x\ny", "z\t"}}), "A     B\nx\\ny  z\\t"; got != want {
		t.Errorf("the table is %q, want %q", got, want)
	}
}
