// SPDX-License-Identifier: MPL-2.0

package request

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The agent's example names the plugin's default, too.
func TestExampleConfigurationIsTheDefaultPolicy(t *testing.T) {
	text, err := os.ReadFile("../../deploy/weir.d/weir.hcl")
	if err != nil {
		t.Fatal(err)
	}
	setting := regexp.MustCompile(`(?m)^(\s*)# ((job_args|consul_exclusions|default_uid) +=)`)
	if found := len(setting.FindAll(text, -1)); found != 3 {
		t.Errorf("%d keys of the policy in the example, want 3", found)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "weir.hcl"), setting.ReplaceAll(text, []byte("$1$2")), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := readPolicy(Network{}, dir)
	if err != nil {
		t.Fatal(err)
	}
	want := defaultPolicy()
	want.source = got.source
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(policy{})); diff != "" {
		t.Errorf("policy (-default +example):\n%s", diff)
	}
}

// FuzzPolicyFile holds the operator's files as the plugin reads them: refused by name,
// or a policy of arguments that there are.
func FuzzPolicyFile(f *testing.F) {
	for _, seed := range []string{
		"", `cni { job_args = ["mode", "guard"] }`, `cni { job_args = ["garud"] }`, `cni { job_args = [] }`, `cni { job_args = [null] }`, `cni { job_args = 7 }`,
		`proxy { default_uid = -1 }`, `proxy { default_uid = 4294967296 }`, "cni {}\ncni {}", `cni { consul_exclusions = "false" }`, `cni { consul_exclusions = null }`,
		`cni { job_args = [for x in ["mode"] : x] }`, `guard { default = var.x }`,
	} {
		f.Add(seed)
	}
	dir := f.TempDir()
	path := filepath.Join(dir, "weir.hcl")
	f.Fuzz(func(t *testing.T, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := readPolicy(Network{}, dir)
		if err != nil {
			if !strings.Contains(err.Error(), path) {
				t.Errorf("%q: the error names no file: %v", text, err)
			}
			return
		}
		for _, name := range got.jobArgs {
			if !slices.Contains(JobArgs(), name) {
				t.Errorf("%q: a job may set %q, which there is not", text, name)
			}
		}
	})
}
