// SPDX-License-Identifier: MPL-2.0

package base

import (
	"fmt"
	"regexp"
	"strings"
	"unicode"

	"github.com/hashicorp/cli"
)

// Printable is what a terminal gets to see. Names of processes, jobs and services are
// chosen by whoever runs them: escape sequences in one would write over what this
// program says. All that is not printed stands as Go would write it, but for line
// ends, tabs and the colours of this program.
type Printable struct{ cli.Ui }

// Output is that of cli.Ui, as are the others.
func (p Printable) Output(text string) { p.Ui.Output(printed(text)) }
func (p Printable) Info(text string)   { p.Ui.Info(printed(text)) }
func (p Printable) Warn(text string)   { p.Ui.Warn(printed(text)) }
func (p Printable) Error(text string)  { p.Ui.Error(printed(text)) }

func printed(text string) string {
	if !strings.ContainsFunc(text, func(r rune) bool { return r != '\n' && r != '\t' && !unicode.IsPrint(r) }) {
		return text
	}
	// What paint and HCL's diagnostics write.
	colours := regexp.MustCompile("\x1b\\[(?:[014]|3[1-6])?m")
	var out strings.Builder
	plain := func(text string) {
		for _, r := range text {
			switch {
			case r == '\n' || r == '\t' || unicode.IsPrint(r):
				out.WriteRune(r)
			default:
				out.WriteString(strings.Trim(fmt.Sprintf("%+q", r), "'"))
			}
		}
	}
	last := 0
	for _, at := range colours.FindAllStringIndex(text, -1) {
		plain(text[last:at[0]])
		out.WriteString(text[at[0]:at[1]])
		last = at[1]
	}
	plain(text[last:])
	return out.String()
}

// Cell is a cell of a table: in one line, whatever the name in it.
func Cell(text string) string {
	return strings.NewReplacer("\n", `\n`, "\t", `\t`).Replace(text)
}
