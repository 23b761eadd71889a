// SPDX-License-Identifier: MPL-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
)

// The measurement of the programs is a test of package redirect, which prints a line for each
// program when reportEnv is set.
const (
	reportSuite = "redirect"
	reportTest  = "^TestReport$"
	reportEnv   = "WEIR_TEST_REPORT"
	reportMark  = "REPORT "

	tableBegin = "<!-- kernels:begin -->"
	tableEnd   = "<!-- kernels:end -->"
)

// measurement is one line of the report.
type measurement struct {
	Program      string  `json:"program"`
	Instructions int     `json:"instructions"`
	LoadMillis   float64 `json:"load_millis"`
	Memory       int     `json:"memory"`
}

func (m measurement) String() string {
	memory := fmt.Sprintf("%.1f KiB", float64(m.Memory)/1024)
	if m.Memory >= 1<<20 {
		memory = fmt.Sprintf("%.1f MiB", float64(m.Memory)/(1<<20))
	}
	if m.Instructions == 0 {
		return memory
	}
	return fmt.Sprintf("%d, %.1f ms, %s", m.Instructions, m.LoadMillis, memory)
}

// measurements reads the report lines of one guest.
func measurements(r kernelResult) ([]measurement, error) {
	var found []measurement
	for _, p := range r.packages {
		for _, output := range p.output {
			for line := range strings.Lines(output) {
				_, text, ok := strings.Cut(line, reportMark)
				if !ok {
					continue
				}
				var m measurement
				if err := json.Unmarshal([]byte(text), &m); err != nil {
					return nil, fmt.Errorf("read report line %q: %w", line, err)
				}
				found = append(found, m)
			}
		}
	}
	if len(found) == 0 {
		return nil, errors.New("read report: the guest printed none")
	}
	return found, nil
}

// table renders the measurements, a row per program and a column per kernel.
func table(results []kernelResult) (string, error) {
	head, rule := "| program |", "|---|"
	var order []string
	rows := map[string]string{}
	for i, r := range results {
		head += fmt.Sprintf(" %s |", r.image.release)
		rule += "---|"
		found, err := measurements(r)
		if err != nil {
			return "", fmt.Errorf("kernel %s: %w", r.image.release, err)
		}
		for _, m := range found {
			if _, ok := rows[m.Program]; !ok {
				order = append(order, m.Program)
				rows[m.Program] = strings.Repeat(" - |", i)
			}
			rows[m.Program] += " " + m.String() + " |"
		}
		for name, row := range rows {
			rows[name] = row + strings.Repeat(" - |", i+1-strings.Count(row, "|"))
		}
	}
	var text strings.Builder
	where := map[string]string{"tcg": "in an emulated processor, some ten times slower than a real one", "kvm": "in a virtual machine"}
	fmt.Fprintf(&text, `Instructions that the verifier looks at; time to load, relocation in user space included (%s;
the shortest of five); memory. Of a map the kernel tells before Linux 6.4 the most that it may
take, later what it takes.

%s
%s
`, where[results[0].accel], head, rule)
	for _, name := range order {
		fmt.Fprintf(&text, "| %s |%s\n", name, rows[name])
	}
	return text.String(), nil
}

// writeTable replaces what lies between the markers.
func writeTable(file string, results []kernelResult) error {
	for _, r := range results {
		if r.failed() {
			return fmt.Errorf("measure programs: kernel %s failed", r.image.release)
		}
	}
	made, err := table(results)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("write table: %w", err)
	}
	before, rest, begin := strings.Cut(string(text), tableBegin)
	_, after, end := strings.Cut(rest, tableEnd)
	if !begin || !end {
		return fmt.Errorf("write table: %s has no %s and %s", file, tableBegin, tableEnd)
	}
	return os.WriteFile(file, []byte(before+tableBegin+"\n"+made+tableEnd+after), 0o644)
}
