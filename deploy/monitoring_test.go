// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/test"
)

// Each alert fires where it should and does not where it should not, as Prometheus
// itself computes it; the first scene of weir.rules_test.yml is a proxy that never
// listens on a node that is otherwise healthy.
func TestAlertRules(t *testing.T) {
	test.Need(t, test.Tool("promtool"))
	t.Log(output(t, "promtool", "check", "rules", "prometheus/weir.rules.yml"))
	t.Log(output(t, "promtool", "test", "rules", "prometheus/weir.rules_test.yml"))
	tested, rules := read(t, "prometheus/weir.rules_test.yml"), read(t, "prometheus/weir.rules.yml")
	alerts := regexp.MustCompile(`- alert: (\w+)`).FindAllStringSubmatch(rules, -1)
	if len(alerts) == 0 {
		t.Fatal("there are no alerts")
	}
	for _, alert := range alerts {
		// With labels expected behind the name, not only that nothing fires.
		if !regexp.MustCompile(`alertname: ` + alert[1] + `\n\s+eval_time: \w+\n\s+exp_alerts:\n`).MatchString(tested) {
			t.Errorf("no test fires %s", alert[1])
		}
	}
}

// A metric or a label that no agent exports makes an alert that never fires and a
// panel without data: both are held to docs/metrics.md, which is held to the code.
func TestMonitoringNamesWhatIsExported(t *testing.T) {
	exported := make(map[string][]string)
	var labels []string
	for _, row := range regexp.MustCompile("(?m)^\\| `(weir_\\w+)` \\| (\\w+) \\| (.*?) \\|").FindAllStringSubmatch(read(t, "../docs/metrics.md"), -1) {
		for _, label := range strings.Split(row[3], ",") {
			exported[row[1]] = append(exported[row[1]], strings.Trim(label, "` "))
		}
		if row[2] == "histogram" {
			labels = append(labels, "le")
			for _, part := range []string{"_bucket", "_sum", "_count"} {
				exported[row[1]+part] = []string{"le"}
			}
		}
		labels = append(labels, exported[row[1]]...)
	}
	var verdicts []string
	for _, verdict := range bpfmap.AllVerdicts() {
		verdicts = append(verdicts, verdict.String())
	}
	prometheus := []string{"instance", "job"} // of its own, for every series

	board := read(t, "grafana/weir.json")
	if !json.Valid([]byte(board)) {
		t.Error("the board is not JSON")
	}
	board = strings.ReplaceAll(board, `\"`, `"`)
	seen := make(map[string]bool)
	for name, text := range map[string]string{"the rules": read(t, "prometheus/weir.rules.yml"), "the board": board} {
		for _, metric := range regexp.MustCompile(`\b(weir_\w+)(?:\{([^}]*)\})?`).FindAllStringSubmatch(text, -1) {
			seen[metric[1]] = true
			if exported[metric[1]] == nil {
				t.Errorf("%s: no agent exports %s", name, metric[1])
			}
			for _, label := range regexp.MustCompile(`(\w+)(?:=|!=|=~|!~)"`).FindAllStringSubmatch(metric[2], -1) {
				if !slices.Contains(append(exported[metric[1]], prometheus...), label[1]) {
					t.Errorf("%s: %s has no label %s", name, metric[1], label[1])
				}
			}
		}
		for _, by := range regexp.MustCompile(`\b(?:by|on) \(([^)]*)\)`).FindAllStringSubmatch(text, -1) {
			for _, label := range strings.Split(by[1], ",") {
				if label = strings.TrimSpace(label); !slices.Contains(append(labels, prometheus...), label) {
					t.Errorf("%s: no metric has a label %s", name, label)
				}
			}
		}
		for _, verdict := range regexp.MustCompile(`verdict(?:=|!=|=~|!~)"([^"]+)"`).FindAllStringSubmatch(text, -1) {
			for _, one := range strings.Split(verdict[1], "|") {
				if !slices.Contains(verdicts, one) {
					t.Errorf("%s: there is no verdict %s", name, one)
				}
			}
		}
	}
	for _, metric := range []string{"weir_healthy", "weir_problems", "weir_verdicts_total", "weir_workload_in_sync", "weir_table_rows"} {
		if !seen[metric] {
			t.Errorf("neither rules nor board has %s", metric)
		}
	}
	runbook := read(t, "../docs/runbook.md")
	for _, anchor := range regexp.MustCompile(`docs/runbook\.md#([\w-]+)"`).FindAllStringSubmatch(read(t, "prometheus/weir.rules.yml"), -1) {
		if !regexp.MustCompile(`(?mi)^#+ ` + regexp.QuoteMeta(anchor[1]) + `$`).MatchString(runbook) {
			t.Errorf("the runbook has no heading %s", anchor[1])
		}
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}
