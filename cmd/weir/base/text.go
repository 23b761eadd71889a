// SPDX-License-Identifier: MPL-2.0

package base

import (
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/mitchellh/go-wordwrap"
	"github.com/weirmesh/weir/cni/ended"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// WorkloadName is how people know a workload: job, group and the short form of its
// allocation's ID; the last alone where the request named no job.
func WorkloadName(job, group string, key workload.AttachmentID) string {
	parts := []string{}
	for _, part := range []string{job, group, Short(key.ContainerID)} {
		if part != "" {
			parts = append(parts, part)
		}
	}
	return strings.Join(parts, "/")
}

func CountOf(count int, noun string) string {
	if count == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", count, noun)
}

// StartAgent is how a node gets one.
const StartAgent = "'systemctl enable --now weir-agent', or run weir.nomad.hcl, Nomad's system job for it"

// Cut shortens the cells of some columns, the longest first, until the table is no wider than asked.
func Cut(rows [][]string, width int, columns ...int) [][]string {
	const gap, least = 2, 6
	widths := make([]int, len(rows[0]))
	total := -gap
	for column := range widths {
		for _, row := range rows {
			widths[column] = max(widths[column], len([]rune(row[column])))
		}
		total += widths[column] + gap
	}
	for ; total > width; total-- {
		widest := slices.MaxFunc(columns, func(a, b int) int { return widths[a] - widths[b] })
		if widths[widest] <= least {
			break
		}
		widths[widest]--
	}
	for _, row := range rows {
		for _, column := range columns {
			if cell := []rune(row[column]); len(cell) > widths[column] {
				row[column] = string(cell[:widths[column]-1]) + "…"
			}
		}
	}
	return rows
}

// Hang breaks a sentence into lines of 80 columns, the later ones indented.
func Hang(text string) string {
	const width = 78
	return strings.ReplaceAll(wordwrap.WrapString(text, width), "\n", "\n  ")
}

// Indented fits text into the columns behind an indent, which the lines that follow the
// first one have.
func Indented(text string, indent int) string {
	lines := strings.Split(wordwrap.WrapString(text, uint(Columns-indent)), "\n")
	for i, line := range slices.Clone(lines) {
		lines[i] = strings.TrimSpace(line)
	}
	return strings.Join(lines, "\n"+strings.Repeat(" ", indent))
}

// Ago is how long a moment is over, in one unit.
func Ago(now, at time.Time) string {
	d := max(now.Sub(at), 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// Clip shortens text to a width. What follows the last mark is kept.
func Clip(text string, width int, mark string) string {
	letters := []rune(text)
	if len(letters) <= width {
		return text
	}
	var tail []rune
	if i := strings.LastIndex(text, mark); mark != "" && i >= 0 {
		tail = []rune(text[i:])
	}
	return string(letters[:max(width-1-len(tail), 0)]) + "…" + string(tail)
}

func AllocationOf(w inspect.Record) string { return AllocID(w.Request.Job.AllocID, w.Key) }

// Columns is the width of what is printed for people.
const Columns = 80

// Short is the first part of an allocation's ID, as Nomad prints it.
func Short(id string) string {
	if len(id) > 8 {
		return id[:8]
	}
	return id
}

// OrDash shows an empty field.
func OrDash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

// Table aligns rows in columns. The first row is the heading.
func Table(indent string, rows [][]string) string {
	var text strings.Builder
	writer := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		cells := make([]string, len(row))
		for i := range row {
			cells[i] = Cell(row[i])
		}
		fmt.Fprintln(writer, indent+strings.Join(cells, "\t"))
	}
	writer.Flush() // a strings.Builder takes everything
	lines := strings.Split(strings.TrimRight(text.String(), "\n"), "\n")
	for i, line := range lines {
		lines[i] = strings.TrimRight(line, " ")
	}
	return strings.Join(lines, "\n")
}

// WrapLast breaks the cells of the last column into rows of their own, until the table is no
// wider than asked.
func WrapLast(rows [][]string, width int) (wrapped [][]string) {
	const gap, least = 2, 20
	last := len(rows[0]) - 1
	for column := range last {
		widest := 0
		for _, row := range rows {
			widest = max(widest, len([]rune(row[column])))
		}
		width -= widest + gap
	}
	for _, row := range rows {
		for i, line := range strings.Split(wordwrap.WrapString(row[last], uint(max(width, least))), "\n") {
			cells := make([]string, len(row))
			if i == 0 {
				copy(cells, row)
			}
			cells[last] = line
			wrapped = append(wrapped, cells)
		}
	}
	return wrapped
}

func AttachmentName(a ended.Attachment) string { return WorkloadName(a.Job.ID, a.Job.Group, a.Key) }
