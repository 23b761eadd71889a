// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/cli"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/maintain"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// doctorArgs are those of a node of the test's own, on which nothing is installed
// and Consul is not asked.
func doctorArgs(t *testing.T, more ...string) []string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"bin", "config", "cache", "netns"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	config := fmt.Sprintf("consul {\n  enabled = false\n}\ncni {\n  cache_dir = %q\n  netns_dir = %q\n}\n", dir+"/cache", dir+"/netns")
	if err := os.WriteFile(dir+"/weir.hcl", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return append([]string{"doctor", "-config", dir + "/weir.hcl", "-cni-path", dir + "/bin", "-cni-config-dir", dir + "/config"}, more...)
}

func features(count int) (list []health.Check) {
	for i := range count {
		list = append(list, health.Check{Group: "kernel", Code: "kernel-feature", Result: health.ResultOK, What: fmt.Sprintf("feature %d, needed to do %d things", i+1, i+1)})
	}
	return list
}

func TestDoctorBeforeAnInstallation(t *testing.T) {
	n := &node{proc: t.TempDir(), ready: append(features(5), health.Check{
		Group: "kernel", Code: "bpf-jit", Result: health.ResultWarning, What: "net.core.bpf_jit_enable is 0: programs are interpreted, which costs several times the time for each connection",
		Remedy: "'sysctl -w net.core.bpf_jit_enable=1', and the same in /etc/sysctl.d",
	})}
	args := doctorArgs(t, "-pre")
	got := try(t, n, nil, args...)
	dir := filepath.Dir(args[2])
	want(t, outcome{got.code, strings.ReplaceAll(strings.ReplaceAll(got.stdout, "\n    ", " "), dir, "DIR"), got.stderr}, outcome{stdout: `ready, with 4 warnings

Configuration
  ✓ the agent's configuration in DIR/weir.hcl is valid

Kernel
  ✓ kernel-feature: 5 are in order, -verbose lists them
  ‼ net.core.bpf_jit_enable is 0: programs are interpreted, which costs several times the time for each connection remedy: 'sysctl -w net.core.bpf_jit_enable=1', and the same in /etc/sysctl.d see docs/runbook.md#bpf-jit

Nomad
  ✓ cni_path DIR/bin is there
  ✓ no consul-cni is in the way of Weir's
  ‼ DIR/bin/bridge is not there: Nomad places no job with network mode bridge here remedy: install the reference CNI plugins, 1.3.0 or newer, into Nomad's cni_path; networks of cni/weir do without see docs/runbook.md#bridge-plugin
  ✓ every network in DIR/config can be read
  ‼ no process 'nomad agent' is found: its version is not checked remedy: start Nomad's client, and run this again see docs/runbook.md#nomad-version

Consul
  ‼ Consul is not asked: nothing keeps ports in sync, and no job without transparent_proxy is guarded remedy: consul { enabled = true } in the configuration see docs/runbook.md#consul-address

Allocations
  ✓ no allocation of the mesh on this node is without Weir
`})
	if got := try(t, n, nil, append(args, "-verbose")...); !strings.Contains(got.stdout, "  ✓ feature 3, needed to do 3 things\n") {
		t.Errorf("-verbose does not list each check:\n%s", got.stdout)
	}
}

// Lines fit a terminal of 80 columns, but for what cannot be broken.
func TestDoctorFitsATerminal(t *testing.T) {
	n := &node{proc: t.TempDir(), ready: []health.Check{{
		Group: "kernel", Code: "kernel-feature", Result: health.ResultFault, Remedy: strings.Repeat("do this and that ", 20), What: strings.Repeat("something is not as it should be ", 10),
	}}}
	for line := range strings.Lines(try(t, n, nil, doctorArgs(t)...).stdout) {
		if line = strings.TrimRight(line, "\n"); utf8.RuneCountInString(line) > 80 && !strings.Contains(line, os.TempDir()) {
			t.Errorf("a line of %d columns: %s", utf8.RuneCountInString(line), line)
		}
	}
}

func TestDoctorWithFaults(t *testing.T) {
	n := &node{proc: t.TempDir(), agent: &api.Status{Workloads: []api.WorkloadView{
		{Key: workload.AttachmentID{ContainerID: "0b5d0c1e", IfName: "eth0"}, Job: "demo", Group: "web", State: api.StateUnprotected,
			Problems: []health.Problem{{What: "its namespace cannot be entered", Remedy: "'nomad alloc stop' it"}}},
		{Key: workload.AttachmentID{ContainerID: "1b5d0c1e", IfName: "eth0"}, Job: "old", Group: "web", State: api.StateConsul},
		{Key: workload.AttachmentID{ContainerID: "2b5d0c1e", IfName: "eth0"}, Job: "good", Group: "web", State: api.StateManaged},
	}}, status: inspect.Status{Problems: []health.Problem{{What: "the data path is not loaded", Remedy: "run 'weir load'"}}}}
	got := try(t, n, nil, doctorArgs(t, "-json")...)
	var report maintain.DoctorReport
	if err := json.Unmarshal([]byte(got.stdout), &report); err != nil || got.code != 2 || report.Schema != 1 {
		t.Fatalf("code %d, schema %d, %v; want code 2 and schema 1:\n%s", got.code, report.Schema, err, got.stdout)
	}
	results := make(map[string]health.Check)
	for _, check := range report.Checks {
		results[check.Code] = check
	}
	for code, want := range map[string]health.Check{
		"data-path": {Group: "weir", Result: health.ResultFault, What: "the data path is not loaded", Remedy: "run 'weir load'"},
		"agent":     {Group: "weir", Result: health.ResultOK, What: "the agent runs"},
		"allocation-unprotected": {Group: "allocations", Result: health.ResultFault,
			What: "allocation demo/web/0b5d0c1e is in the mesh and not under Weir: its namespace cannot be entered", Remedy: "'nomad alloc stop' it"},
		"allocation-consul": {Group: "allocations", Result: health.ResultWarning,
			What:   "allocation old/web/1b5d0c1e was redirected by consul-cni: its own rules hold until Nomad starts a new one in its place",
			Remedy: "nothing, it goes on as it is; 'nomad alloc stop' it for one that is under Weir"},
	} {
		want.Code = code
		if diff := cmp.Diff(want, results[code]); diff != "" {
			t.Errorf("%s (-want +got):\n%s", code, diff)
		}
	}
	if text := try(t, n, nil, doctorArgs(t)...); text.code != 2 || !strings.HasPrefix(text.stdout, "not ready: 3 faults, 4 warnings\n") {
		t.Errorf("outcome = %+v", text)
	}
	if text := tryOn(t, n, true, nil, doctorArgs(t)...); !strings.Contains(text.stdout, "\x1b[31m✗\x1b[0m") {
		t.Errorf("no colour in a terminal:\n%s", text.stdout)
	}
	if text := tryOn(t, n, true, map[string]string{"NO_COLOR": "1"}, doctorArgs(t)...); strings.Contains(text.stdout, "\x1b[") {
		t.Errorf("colour under NO_COLOR:\n%s", text.stdout)
	}
}

// A configuration that is not valid is a fault, and the rest is checked all the same.
func TestDoctorOfAnInvalidConfiguration(t *testing.T) {
	args := doctorArgs(t, "-pre")
	if err := os.WriteFile(args[2], []byte(`cni { job_args = ["garud"] }`), 0o600); err != nil {
		t.Fatal(err)
	}
	got := try(t, &node{proc: t.TempDir()}, nil, args...)
	if got.code != 2 || !strings.Contains(got.stdout, `"garud"`) || !strings.Contains(got.stdout, "\nNomad\n") || strings.Contains(got.stdout, "\nConsul\n") {
		t.Errorf("outcome = %+v", got)
	}
}

// A real node, loaded and not: it attaches nothing and changes no file.
func TestDoctorChangesNothing(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	pins, state, cgroup := test.BPFFS(t), t.TempDir(), test.NewCgroup(t).Path
	environment := map[string]string{"WEIR_PIN_DIR": pins + "/weir", "WEIR_STATE_DIR": state + "/state", "WEIR_CGROUP_ROOT": cgroup}
	args := doctorArgs(t)
	seen := func() (list []string) {
		// To another instance all that is attached there is of others.
		status, err := redirect.New(store.Paths{PinDir: pins + "/another", StateDir: state + "/another", CgroupRoot: cgroup}).Status()
		if err != nil {
			t.Fatal(err)
		}
		for _, other := range status.Others {
			list = append(list, fmt.Sprintf("%s: program %d, link %s", other.Hook, other.ID, other.Pinned))
		}
		for _, dir := range []string{pins, state, filepath.Dir(args[2])} {
			err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
				var stat unix.Stat_t
				if err == nil {
					err = unix.Lstat(path, &stat)
				}
				list = append(list, fmt.Sprintf("%s: inode %d, mode %o, size %d, changed %v", path, stat.Ino, stat.Mode, stat.Size, stat.Ctim))
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		return list
	}
	for _, loaded := range []bool{false, true} {
		if loaded {
			if code := weirTo(t.Context(), cli.NewMockUi(), environment, "load"); code != 0 {
				t.Fatal("weir load failed")
			}
			t.Cleanup(func() { weirTo(context.Background(), cli.NewMockUi(), environment, "unload", "-force") })
		}
		before := seen()
		for _, more := range [][]string{{"-pre"}, {}, {"-json"}} {
			ui := cli.NewMockUi()
			code := weirTo(t.Context(), ui, environment, append(args, more...)...)
			wanted := 2 // no consul-cni, and before the load no data path
			if len(more) > 0 && more[0] == "-pre" {
				wanted = 0
			}
			if code != wanted {
				t.Errorf("loaded %t: weir doctor %v: exit %d, want %d:\n%s%s", loaded, more, code, wanted, ui.OutputWriter.String(), ui.ErrorWriter.String())
			}
		}
		if diff := cmp.Diff(before, seen()); diff != "" {
			t.Errorf("loaded %t: the node (-before +after):\n%s", loaded, diff)
		}
		if loaded && len(before) < 14 {
			t.Errorf("nothing is attached, so nothing was tested: %v", before)
		}
	}
}
