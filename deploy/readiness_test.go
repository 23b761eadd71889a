// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/health"
)

// script is a program that prints a text, as a plugin or Nomad prints its version.
func script(t *testing.T, path, says string, code int) {
	t.Helper()
	text := fmt.Sprintf("#!/bin/sh\necho '%s' >&2\necho '%s'\nexit %d\n", says, says, code)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
}

// fakeProc is a /proc with one Nomad agent that started at a time.
func fakeProc(t *testing.T, version string, started time.Time) string {
	t.Helper()
	proc := t.TempDir()
	const boot = 1_000_000_000
	script(t, filepath.Join(proc, "42", "exe"), "Nomad "+version, 0)
	for path, text := range map[string]string{
		"42/cmdline": "/usr/bin/nomad\x00agent\x00-config=/etc/nomad.d\x00",
		"42/stat":    fmt.Sprintf("42 (nomad (x) y) S 1 %s%d 0 0\n", strings.Repeat("0 ", 17), (started.Unix()-boot)*100),
		"stat":       fmt.Sprintf("cpu 1 2 3\nbtime %d\n", boot),
	} {
		if err := os.WriteFile(filepath.Join(proc, path), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return proc
}

// found are the results by code, and what is said of the code.
func found(t *testing.T, n Node, proc string, before bool, code string) (results map[string]health.Result, says string) {
	t.Helper()
	results = make(map[string]health.Result)
	for _, check := range n.Readiness(t.Context(), proc, before) {
		if check.Group != "nomad" || (check.Remedy == "") != (check.Result == health.ResultOK) {
			t.Errorf("check %+v: want the group nomad, and a remedy where it is not ok", check)
		}
		results[check.Code] = check.Result
		if check.Code == code {
			says = check.What
		}
	}
	return results, says
}

// An installed node, what is done to it, and what is said then.
func TestReadiness(t *testing.T) {
	source := standIns(t)
	const ok, warning, fault = health.ResultOK, health.ResultWarning, health.ResultFault
	plugin := func(n Node, name string) string { return n.on(filepath.Join(n.Layout.CNIPath, name)) }
	after, earlier := time.Now().Add(time.Hour), time.Now().Add(-time.Hour)
	remove := func(path string) {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name    string
		nomad   string
		started time.Time
		change  func(n Node)
		code    string
		want    health.Result
		says    string
	}{
		{"in order", "v1.11.3", after, func(Node) {}, "nomad-version", ok, "Nomad is of version 1.11.3, Weir was tested with 1.11.1"},
		{"started before", "v1.11.1", earlier, func(Node) {}, "nomad-restart", warning, "before the plugin was installed"},
		{"an old Nomad", "v1.7.7", after, func(Node) {}, "nomad-version", fault, "transparent proxies need 1.8.0"},
		{"a newer Nomad", "v2.0.6-dev", after, func(Node) {}, "nomad-version", warning, "2.0.6-dev"},
		{"no consul-cni", "v1.11.1", after, func(n Node) { remove(plugin(n, consulName)) }, "consul-cni", fault, "is not there"},
		{"somebody else's", "v1.11.1", after, func(n Node) {
			remove(plugin(n, consulName))
			script(t, plugin(n, consulName), "consul-cni v1.9.4", 0)
		}, "consul-cni", fault, "is not Weir's"},
		{"an old version line", "v1.11.1", after, func(n Node) {
			remove(plugin(n, consulName))
			script(t, plugin(n, consulName), "consul-cni v1.4.1", 0)
		}, "consul-cni-version", fault, "says version v1.4.1"},
		{"no version line", "v1.11.1", after, func(n Node) { script(t, plugin(n, "bridge"), "CNI bridge plugin", 0) }, "bridge-plugin", warning, "no word"},
		{"a plugin that fails", "v1.11.1", after, func(n Node) { script(t, plugin(n, "bridge"), "v1.9.1", 1) }, "bridge-plugin", warning, "exit status 1"},
		{"an old bridge", "v1.11.1", after, func(n Node) { script(t, plugin(n, "bridge"), "CNI bridge plugin v1.2.0", 0) }, "bridge-plugin", warning, "v1.2.0"},
		{"no bridge", "v1.11.1", after, func(n Node) { remove(plugin(n, "bridge")) }, "bridge-plugin", warning, "is not there"},
		{"a conflist that cannot be read", "v1.11.1", after, func(n Node) {
			if err := os.WriteFile(n.on("/opt/cni/config/half.conflist"), []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "conflist", fault, "half.conflist cannot be read"},
		{"no cni_path", "v1.11.1", after, func(n Node) {
			if err := os.RemoveAll(n.on(n.Layout.CNIPath)); err != nil {
				t.Fatal(err)
			}
		}, "cni-path", fault, "is not there"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := emptyNode(t)
			steps, err := n.PlanInstall(source, false)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := steps.Run(); err != nil {
				t.Fatal(err)
			}
			script(t, plugin(n, "bridge"), "CNI bridge plugin v1.9.1", 0)
			c.change(n)
			results, says := found(t, n, fakeProc(t, c.nomad, c.started), false, c.code)
			if results[c.code] != c.want || !strings.Contains(says, c.says) {
				t.Errorf("%s = %s: %s; want %s that says %q", c.code, results[c.code], says, c.want, c.says)
			}
		})
	}
}

// The real plugin's version line is taken as Nomad takes it.
func TestReadinessOfTheRealPlugin(t *testing.T) {
	n := emptyNode(t)
	steps, err := n.PlanInstall(built(t), false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := steps.Run(); err != nil {
		t.Fatal(err)
	}
	results, says := found(t, n, fakeProc(t, "v1.11.1", time.Now().Add(time.Hour)), false, "consul-cni-version")
	want := map[string]health.Result{
		"cni-path": health.ResultOK, "consul-cni": health.ResultOK, "consul-cni-version": health.ResultOK, "bridge-plugin": health.ResultWarning,
		"conflist": health.ResultOK, "nomad-version": health.ResultOK, "nomad-restart": health.ResultOK,
	}
	if diff := cmp.Diff(want, results); diff != "" {
		t.Errorf("results (-want +got):\n%s", diff)
	}
	if !strings.Contains(says, "says version v1.9.4") {
		t.Errorf("version line: %s", says)
	}
}

// Before an installation its own parts are not missed, and somebody else's plugin
// is told with the way past it.
func TestReadinessBeforeAnInstallation(t *testing.T) {
	n := emptyNode(t)
	none := t.TempDir() // no process
	results, _ := found(t, n, none, true, "")
	want := map[string]health.Result{"cni-path": health.ResultWarning, "conflist": health.ResultOK, "nomad-version": health.ResultWarning}
	if diff := cmp.Diff(want, results); diff != "" {
		t.Errorf("an empty node (-want +got):\n%s", diff)
	}
	script(t, n.on(n.Layout.CNIPath+"/"+consulName), "consul-cni v1.9.4", 0)
	script(t, n.on(n.Layout.CNIPath+"/bridge"), "v1.9.1", 0)
	results, says := found(t, n, fakeProc(t, "v1.11.1", time.Now()), true, "consul-cni")
	want = map[string]health.Result{
		"cni-path": health.ResultOK, "consul-cni": health.ResultWarning, "consul-cni-version": health.ResultOK, "bridge-plugin": health.ResultOK,
		"conflist": health.ResultOK, "nomad-version": health.ResultOK,
	}
	if diff := cmp.Diff(want, results); diff != "" {
		t.Errorf("a node with HashiCorp's plugin (-want +got):\n%s", diff)
	}
	if !strings.Contains(says, "is not Weir's") {
		t.Errorf("consul-cni: %s", says)
	}
}

// What was tested is what the tests' tools are built from.
func TestTestedVersionOfNomad(t *testing.T) {
	text, err := os.ReadFile("../test/tools/nomad/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "github.com/hashicorp/nomad "+TestedNomad+" ") && !strings.Contains(string(text), "github.com/hashicorp/nomad "+TestedNomad+"\n") {
		t.Errorf("test/tools/nomad/go.mod does not have Nomad %s", TestedNomad)
	}
}
