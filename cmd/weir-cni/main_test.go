// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// A Nomad client waits for one plugin call at a time, and so do all allocations that
// start on it.
func TestPluginRunsBeforeOthers(t *testing.T) {
	test.Need(t, test.Root, test.Tool("go"))
	program := filepath.Join(t.TempDir(), "weir")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("build the plugin: %v: %s", err, out)
	}
	plugin := exec.Command(program)
	plugin.Env = append(os.Environ(), "CNI_COMMAND=ADD", "CNI_CONTAINERID=first", "CNI_NETNS=/proc/self/ns/net", "CNI_IFNAME=eth0", "CNI_PATH=/")
	stdin, err := plugin.StdinPipe() // the plugin waits for its end
	if err != nil {
		t.Fatal(err)
	}
	if err := plugin.Start(); err != nil {
		t.Fatal(err)
	}
	test.Eventually(t, func() error {
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", plugin.Process.Pid))
		if err != nil {
			return err
		}
		for _, thread := range threads {
			id, err := strconv.Atoi(thread.Name())
			if err != nil {
				return err
			}
			const highest = 40 // 20 less the nice value, as getpriority(2) has it
			if priority, err := unix.Getpriority(unix.PRIO_PROCESS, id); err != nil || priority != highest {
				return fmt.Errorf("thread %d of %d has priority %d, want %d: %v", id, len(threads), priority, highest, err)
			}
		}
		return nil
	}, "the priority of the plugin's threads")
	if err := stdin.Close(); err != nil {
		t.Error(err)
	}
	var exit *exec.ExitError
	if err := plugin.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("the plugin without a configuration ends with %v, want exit status 1", err)
	}
}

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
