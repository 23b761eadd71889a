// SPDX-License-Identifier: MPL-2.0

package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
)

// A row is one line of the table.
type row struct {
	ID      string
	Name    string
	Unit    string
	Floor   string               // the variant that the others are compared with; "" for none
	Samples map[string][]float64 // by variant, one each round
	target  func(row) verdict    // nil: nothing to reach
}

// A report is a finished run, as -json writes it.
type report struct {
	Machine machine       `json:"machine"`
	Quick   bool          `json:"quick"`
	Rows    []reportedRow `json:"rows"`
	Note    string        `json:"-"` // what a reader must know to judge it
}

type reportedRow struct {
	ID      string               `json:"id"`
	Name    string               `json:"name"`
	Unit    string               `json:"unit,omitempty"`
	Floor   string               `json:"floor,omitempty"`
	Medians map[string]summary   `json:"medians"`
	Ratios  map[string]summary   `json:"ratios,omitempty"` // to the floor of the same round
	Samples map[string][]float64 `json:"samples"`
	Target  *verdict             `json:"target,omitempty"`
}

func newReport(m machine, quick bool, rows []row) report {
	r := report{Machine: m, Quick: quick}
	for _, row := range rows {
		reported := reportedRow{
			ID: row.ID, Name: row.Name, Unit: row.Unit, Floor: row.Floor,
			Medians: map[string]summary{}, Ratios: map[string]summary{}, Samples: row.Samples,
		}
		for name, samples := range row.Samples {
			reported.Medians[name] = summarize(samples)
			if row.Floor != "" && name != row.Floor {
				reported.Ratios[name] = summarize(ratios(samples, row.Samples[row.Floor]))
			}
		}
		if row.target != nil {
			v := row.target(row)
			reported.Target = &v
		}
		r.Rows = append(r.Rows, reported)
	}
	return r
}

// save writes the report as JSON.
func (r report) save(path string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

// publish prints the table of a part, and writes it to where the options say.
func (r report) publish(p part, first bool, o options, stdout io.Writer) error {
	if o.json != "" {
		path := o.json
		if !first {
			path += "." + p.name
		}
		if err := r.save(path); err != nil {
			return fmt.Errorf("save samples: %w", err)
		}
	}
	var table strings.Builder
	if err := r.markdown(&table); err != nil {
		return err
	}
	if !first {
		table.WriteString("\n")
	}
	if _, err := io.WriteString(stdout, table.String()); err != nil {
		return err
	}
	if o.readme == "" {
		return nil
	}
	return replaceBetween(o.readme, "<!-- "+p.name+":begin -->\n", "<!-- "+p.name+":end -->", table.String())
}

// replaceBetween writes text between two marks of a file.
func replaceBetween(path, begin, end, text string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, begins := strings.Cut(string(data), begin)
	_, after, ends := strings.Cut(rest, end)
	if !begins || !ends {
		return fmt.Errorf("write table: %s has no %s and %s", path, strings.TrimSpace(begin), end)
	}
	return os.WriteFile(path, []byte(before+begin+text+end+after), 0o644)
}

// comparisonNote says what the figures of a comparison are worth.
const comparisonNote = `
Medians of all rounds; [a-b] is the range from the lower to the upper quartile. x1.05 is the median of the ratios to
"direct" of the same round. "direct" dials the proxy itself, on a machine without Weir; "direct again" is the same, its
ratio is the noise. "limit" is Weir's hooks with one constant destination and no table: the least that could redirect.
"iptables-nft" and "nftables" are Consul's own engines, sdk/iptables before v0.19.0 and sdk/nftables since; "nftables in
process" is the latter without the start of a program, in the rounds of the row. A fresh network namespace for every
measurement; variants in random order; the proxy asks for SO_ORIGINAL_DST on every accept and every answer was right.
"within noise": the ratio is not under the lower quartile of "direct again", or not under 0.98 where that is lower.
"added": what a redirect adds to the median of "direct", Weir's to iptables-nft's, and as a multiple of the limit's. For
foreign sockets "direct" means that Weir is not loaded, "Weir" that it is, and "limit" an empty program on each hook.
`

// markdown writes the table, and under it what a reader must know to judge it.
// A variant that no row has is left out.
func (r report) markdown(w io.Writer) error {
	var out strings.Builder
	var sizes []string
	if len(r.Rows) > 0 {
		sizes = slices.DeleteFunc(slices.Collect(maps.Keys(r.Rows[0].Samples)), func(column string) bool { return !isScale(column) })
		slices.SortFunc(sizes, func(a, b string) int { return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b)) })
	}
	columns := slices.DeleteFunc(append(sizes, []string{direct, directAgain, least, weir, recorded, former, consul, nftables}...), func(column string) bool {
		return !slices.ContainsFunc(r.Rows, func(row reportedRow) bool { return row.cell(column) != "" })
	})
	fmt.Fprintf(&out, "| | %s | to reach | reached |\n", strings.Join(columns, " | "))
	fmt.Fprintf(&out, "|---|%s---|---|\n", strings.Repeat("---|", len(columns)))
	for _, row := range r.Rows {
		fmt.Fprintf(&out, "| %s |", row.Name)
		for _, column := range columns {
			fmt.Fprintf(&out, " %s |", row.cell(column))
		}
		if row.Target == nil {
			out.WriteString(" | |\n")
			continue
		}
		answer := "no"
		if row.Target.Reached {
			answer = "yes"
		}
		fmt.Fprintf(&out, " %s | **%s**: %s |\n", row.Target.Goal, answer, row.Target.Figure)
	}
	fmt.Fprintf(&out, "\n%s\n%s", r.Machine, r.Note)
	if r.Quick {
		out.WriteString("\nQuick run: it shows that everything can be measured, its figures mean nothing.\n")
	}
	_, err := io.WriteString(w, out.String())
	return err
}

func (r reportedRow) cell(column string) string {
	absolute, found := r.Medians[column]
	if !found {
		return ""
	}
	text := strings.TrimSpace(number(absolute.Median) + " " + r.Unit)
	if ratio, found := r.Ratios[column]; found {
		return fmt.Sprintf("%s, x%.2f [%.2f-%.2f]", text, ratio.Median, ratio.Q1, ratio.Q3)
	}
	if absolute.N == 1 {
		return text
	}
	return fmt.Sprintf("%s [%s-%s]", text, number(absolute.Q1), number(absolute.Q3))
}

// number keeps three digits, which is more than the noise leaves.
func number(value float64) string {
	switch size := math.Abs(value); {
	case size >= 100:
		return fmt.Sprintf("%.0f", value)
	case size >= 10:
		return fmt.Sprintf("%.1f", value)
	case value == math.Trunc(value):
		return fmt.Sprintf("%.0f", value)
	default:
		return fmt.Sprintf("%.2f", value)
	}
}
