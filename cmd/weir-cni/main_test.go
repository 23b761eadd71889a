// SPDX-License-Identifier: MPL-2.0

package main

import (
	"os/exec"
	"strings"
	"testing"
)

// An ADD is a process of its own, which starts all that is linked into it before main:
// the regular expressions of knftables alone took as long as the rows of a workload.
// What is on the list came in by way of something small before, or would bring in much.
func TestPluginLinksWhatItNeeds(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatalf("list dependencies: %v", err)
	}
	linked := strings.Fields(string(out))
	if len(linked) < 50 {
		t.Fatalf("%d dependencies, want all of them", len(linked))
	}
	for _, unwanted := range []string{
		"crypto/tls", "crypto/x509", "net/http", "os/user", "testing", "text/template",
		"github.com/coreos/go-iptables", "sigs.k8s.io/knftables", "github.com/containernetworking/plugins/pkg/ip",
		"github.com/containernetworking/plugins/pkg/utils", "github.com/hashicorp/hcl/v2/gohcl", "github.com/hashicorp/hcl/v2/hclwrite",
		"github.com/hashicorp/cli", "github.com/hashicorp/consul", "github.com/prometheus", "github.com/google/go-cmp",
		"github.com/weirmesh/weir/agent", "github.com/weirmesh/weir/cmd/weir/",
	} {
		for _, path := range linked {
			if path == unwanted || strings.HasPrefix(path, strings.TrimSuffix(unwanted, "/")+"/") {
				t.Errorf("weir-cni links %s: 'go list -deps -f {{.ImportPath}}:{{.Imports}} ./cmd/weir-cni' tells by whom", path)
			}
		}
	}
}
