// SPDX-License-Identifier: MPL-2.0

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/cmd/weir/maintain"
)

// writeConfig makes a directory of configuration files and returns its path.
func writeConfig(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestConfigValidate(t *testing.T) {
	dir := writeConfig(t, map[string]string{
		"10-first.hcl": "pin_dir = \"weir\"\ncni {\n  job_args = [\"mode\"]\n}\n",
		"20-last.hcl":  "cni {\n  job_args = [\"mode\", \"garud\"]\n}\nconsul {\n  adress = \"127.0.0.1:8500\"\n}\n",
		"notes.txt":    "no configuration",
	})
	got := try(t, &node{uid: 1000}, nil, "config", "validate", dir)
	text := `Error: Unsupported argument

  on DIR/20-last.hcl line 5, in consul:
   5:   adress = "127.0.0.1:8500"

An argument named "adress" is not expected here. Did you mean "address"?

Error: Invalid value

  on DIR/20-last.hcl line 2, in cni:
   2:   job_args = ["mode", "garud"]

cni.job_args = "garud": want names of mode, guard, egress, forward, proxy-uid,
inbound-port, outbound-port, dns, exclude-inbound-ports,
exclude-outbound-ports, exclude-outbound-cidrs, exclude-uids.

Error: Invalid value

  on DIR/10-first.hcl line 1:
   1: pin_dir = "weir"

pin_dir = "weir": want an absolute path.

DIR: not valid: 3 errors
`
	want(t, outcome{got.code, strings.ReplaceAll(got.stdout, dir, "DIR"), got.stderr}, outcome{code: 1, stdout: text})
	var report maintain.ConfigReport
	asJSON := try(t, &node{}, nil, "config", "validate", "-json", dir)
	if err := json.Unmarshal([]byte(asJSON.stdout), &report); err != nil || asJSON.code != 1 {
		t.Fatalf("-json: code %d, %v in %s", asJSON.code, err, asJSON.stdout)
	}
	last := filepath.Join(dir, "20-last.hcl")
	if report.Schema != 1 || report.Valid || len(report.Problems) != 3 {
		t.Fatalf("report = %+v", report)
	}
	if p := report.Problems[1]; p.File != last || p.Line != 2 || p.Column != 3 || p.Severity != "error" {
		t.Errorf("problem = %+v, want line 2, column 3 of %s", p, last)
	}
}

// What is valid is so for each user, with nothing else on the node read or changed.
func TestConfigValidateAccepts(t *testing.T) {
	example, err := os.ReadFile("../../deploy/weir.d/weir.hcl")
	if err != nil {
		t.Fatal(err)
	}
	dir := writeConfig(t, map[string]string{"weir.hcl": string(example)})
	want(t, try(t, &node{uid: 1000}, nil, "config", "validate", dir), outcome{stdout: dir + ": valid: 1 file\n"})
	want(t, try(t, &node{}, nil, "config", "validate", filepath.Join(dir, "weir.hcl")), outcome{stdout: dir + "/weir.hcl: valid: 1 file\n"})
	if got := try(t, &node{}, nil, "config", "validate", filepath.Join(dir, "none")); got.code != 1 || !strings.Contains(got.stderr, "no such file") {
		t.Errorf("a path that is not there = %+v, want code 1", got)
	}
	empty := t.TempDir()
	want(t, try(t, &node{}, nil, "config", "validate", empty), outcome{stdout: empty + ": valid: it has no .hcl file, every key has its default\n"})
	names := func() (list []string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			list = append(list, entry.Name())
		}
		return list
	}
	if diff := cmp.Diff([]string{"weir.hcl"}, names()); diff != "" {
		t.Errorf("directory (-before +after):\n%s", diff)
	}
}

// The plugin's own rule: a block is there once.
func TestConfigValidateHasTheRulesOfThePlugin(t *testing.T) {
	dir := writeConfig(t, map[string]string{"weir.hcl": "proxy {\n}\nproxy {\n  default_uid = 102\n}\n"})
	if got := try(t, &node{}, nil, "config", "validate", dir); got.code != 1 || !strings.Contains(got.stdout, "proxy") {
		t.Errorf("two blocks = %+v, want code 1", got)
	}
}

// Colours as everywhere.
func TestConfigValidateColour(t *testing.T) {
	dir := writeConfig(t, map[string]string{"weir.hcl": `log_level = "loud"`})
	for environment, colour := range map[string]bool{"": true, "1": false} {
		got := tryOn(t, &node{}, true, map[string]string{"NO_COLOR": environment}, "config", "validate", dir)
		if strings.Contains(got.stdout, "\x1b[") != colour || got.code != 1 {
			t.Errorf("NO_COLOR=%s: %q", environment, got.stdout)
		}
	}
}
