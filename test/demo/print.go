// SPDX-License-Identifier: MPL-2.0

package main

import (
	"fmt"
	"io"
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// printer tells the story, in colour on a terminal.
type printer struct {
	out    io.Writer
	colour bool
	steps  int
	failed int
}

func newPrinter(out *os.File, getenv func(string) string) *printer {
	_, err := unix.IoctlGetTermios(int(out.Fd()), unix.TCGETS)
	return &printer{out: out, colour: err == nil && getenv("NO_COLOR") == "" && getenv("TERM") != "dumb"}
}

const (
	bold  = "1"
	dim   = "2"
	red   = "31"
	green = "32"
	cyan  = "36"
)

func (p *printer) paint(code, text string) string {
	if !p.colour {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// step opens a step of the story.
func (p *printer) step(title string) {
	p.steps++
	fmt.Fprintf(p.out, "\n%s\n", p.paint(bold, fmt.Sprintf("%d. %s", p.steps, title)))
}

// note tells what was done.
func (p *printer) note(format string, args ...any) {
	fmt.Fprintf(p.out, "   %s\n", p.paint(dim, fmt.Sprintf(format, args...)))
}

// fact shows something that was seen.
func (p *printer) fact(name, format string, args ...any) {
	fmt.Fprintf(p.out, "   %-24s %s\n", name, p.paint(cyan, fmt.Sprintf(format, args...)))
}

// check holds what was seen against what must be, and counts a difference.
func (p *printer) check(ok bool, format string, args ...any) {
	mark := p.paint(green, "ok   ")
	if !ok {
		p.failed++
		mark = p.paint(red, "WRONG")
	}
	fmt.Fprintf(p.out, "   %s %s\n", mark, fmt.Sprintf(format, args...))
}

// rises shows which verdicts rose in an allocation.
func (p *printer) rises(group string, rose map[string]uint64) {
	for _, name := range slices.Sorted(maps.Keys(rose)) {
		p.fact("verdicts of "+group, "%s +%d", name, rose[name])
	}
}

// err gives the verdict on the demo itself.
func (p *printer) err() error {
	if p.failed > 0 {
		return fmt.Errorf("%d of the checks went wrong", p.failed)
	}
	return nil
}
