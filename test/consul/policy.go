// SPDX-License-Identifier: MPL-2.0

package consul

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// DocumentedPolicy is the policy that docs/install.md names as the least one of
// the agent's token, for the node of a Server.
func DocumentedPolicy(tb testing.TB) string {
	tb.Helper()
	dir, err := os.Getwd()
	if err != nil {
		tb.Fatal(err)
	}
	for ; dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
	}
	page, err := os.ReadFile(filepath.Join(dir, "docs", "install.md"))
	if err != nil {
		tb.Fatal(err)
	}
	_, text, _ := strings.Cut(string(page), "## Consul's ACLs\n")
	_, text, _ = strings.Cut(text, "```hcl\n")
	rules, _, found := strings.Cut(text, "```\n")
	if !found {
		tb.Fatal("docs/install.md has no policy under \"Consul's ACLs\"")
	}
	return strings.ReplaceAll(rules, "NODE", "node")
}
