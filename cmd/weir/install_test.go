// SPDX-License-Identifier: MPL-2.0

package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/cmd/weir/maintain"
	"github.com/weirmesh/weir/cni"
	"github.com/weirmesh/weir/deploy"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// programs builds both programs, as `make build` does.
func programs(t *testing.T, dir string) (weir string) {
	t.Helper()
	test.Need(t, test.Tool("go"))
	build := exec.Command("go", "build", "-trimpath", "-o", dir+"/", ".", "../weir-cni")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return filepath.Join(dir, "weir")
}

func TestInstallCommand(t *testing.T) {
	n := &node{program: programs(t, t.TempDir())}
	root := t.TempDir()
	if err := os.MkdirAll(root+"/opt/cni/bin", 0o755); err != nil {
		t.Fatal(err)
	}
	foreign := "#!/bin/sh\necho consul-cni v1.5.0\n"
	if err := os.WriteFile(root+"/opt/cni/bin/consul-cni", []byte(foreign), 0o755); err != nil {
		t.Fatal(err)
	}

	got := try(t, n, nil, "install", "-root", root)
	want(t, got, outcome{code: 1, stderr: "weir install: install /opt/cni/bin/consul-cni: another program's file is in the way: " +
		"-replace keeps it as consul-cni.weir-saved\n"})

	got = try(t, n, nil, "install", "-root", root, "-replace", "-dry-run", "-unit-dir", "")
	for _, line := range []string{
		"would create /opt/cni/bin/weir\n",
		"would set aside /opt/cni/bin/consul-cni: kept as /opt/cni/bin/consul-cni.weir-saved\n",
		"would link /opt/cni/bin/consul-cni: to weir; new allocations use Weir\n",
	} {
		if !strings.Contains(got.stdout, line) {
			t.Errorf("install -dry-run does not say %q:\n%s%s", line, got.stdout, got.stderr)
		}
	}
	if strings.Contains(got.stdout, "systemd") {
		t.Errorf("the unit is installed although it was left out:\n%s", got.stdout)
	}
	if content, err := os.ReadFile(root + "/opt/cni/bin/consul-cni"); err != nil || string(content) != foreign {
		t.Errorf("after -dry-run consul-cni is %q, %v", content, err)
	}

	got = try(t, n, nil, "install", "-root", root, "-replace", "-unit-dir", "", "-json")
	var report maintain.InstallReport
	if err := json.Unmarshal([]byte(got.stdout), &report); err != nil || report.Schema != 1 || !report.Steps.Changes() || report.DryRun {
		t.Errorf("install -json = %+v, %v", got, err)
	}
	// Without -unit-dir: the last installation's directories are the defaults.
	got = try(t, n, nil, "install", "-root", root)
	if got.code != 0 || !strings.HasSuffix(got.stdout, "\nnothing to do\n") || strings.Contains(got.stdout, "systemd") {
		t.Errorf("a second installation: %+v", got)
	}

	got = try(t, n, map[string]string{"WEIR_STATE_DIR": t.TempDir()}, "uninstall", "-root", root)
	if line := "restore /opt/cni/bin/consul-cni: from /opt/cni/bin/consul-cni.weir-saved\n"; got.code != 0 || !strings.Contains(got.stdout, line) {
		t.Errorf("uninstall: %+v", got)
	}
	if content, err := os.ReadFile(root + "/opt/cni/bin/consul-cni"); err != nil || string(content) != foreign {
		t.Errorf("after the removal consul-cni is %q, %v", content, err)
	}
}

// A program that lies where a package puts it leaves the package's files to it.
func TestInstallFromAPackage(t *testing.T) {
	prefix, root := t.TempDir(), t.TempDir()
	for _, dir := range []string{"bin", "lib/weir"} {
		if err := os.MkdirAll(filepath.Join(prefix, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n := &node{program: programs(t, filepath.Join(prefix, "bin"))}
	if err := os.Rename(prefix+"/bin/weir-cni", prefix+"/lib/weir/weir-cni"); err != nil {
		t.Fatal(err)
	}
	got := try(t, n, nil, "install", "-root", root, "-json")
	var report maintain.InstallReport
	if err := json.Unmarshal([]byte(got.stdout), &report); err != nil {
		t.Fatal(err, got)
	}
	for _, step := range report.Steps {
		if strings.HasPrefix(step.Path, "/usr") || strings.HasPrefix(step.Path, "/etc") {
			t.Errorf("it does %s", step)
		}
	}
	if _, err := os.Stat(root + "/opt/cni/bin/weir"); err != nil {
		t.Error(err)
	}
	n.program = filepath.Join(t.TempDir(), "weir")
	if err := os.WriteFile(n.program, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if got := try(t, n, nil, "install", "-root", root); got.code != 1 || !strings.Contains(got.stderr, "name it with -plugin") {
		t.Errorf("without a plugin: %+v", got)
	}
}

// The next step is said after every installation, also after one that had nothing to
// do: it may never have been followed.
func TestNextStepAfterInstall(t *testing.T) {
	const (
		nomad     = "restart Nomad's client (from Nomad 1.11.2 on a SIGHUP will do): it looks at plugins when it starts; what runs goes on"
		own       = "systemctl daemon-reload && systemctl enable weir-agent && systemctl restart weir-agent"
		installed = "systemctl enable --now weir-agent"
	)
	some, none := deploy.Steps{{Do: deploy.Create, Path: "/x"}}, deploy.Steps{{Do: deploy.Keep, Path: "/x"}}
	packaged := deploy.DefaultLayout()
	packaged.Bin, packaged.Units, packaged.Config = "", "", ""
	for _, each := range []struct {
		name   string
		layout deploy.Layout
		report maintain.InstallReport
		unit   bool // is enabled
		want   []string
	}{
		{"from a tarball", deploy.DefaultLayout(), maintain.InstallReport{Steps: some}, false, []string{nomad, own, "weir status"}},
		{"again", deploy.DefaultLayout(), maintain.InstallReport{Steps: none}, false, []string{own, "weir status"}},
		{"again, where systemd runs it", deploy.DefaultLayout(), maintain.InstallReport{Steps: none}, true, []string{"weir status"}},
		{"another version", deploy.DefaultLayout(), maintain.InstallReport{Steps: some}, true, []string{nomad, own, "weir status"}},
		{"from the package", packaged, maintain.InstallReport{Steps: some}, false, []string{nomad, installed, "weir status"}},
		{"from the package again", packaged, maintain.InstallReport{Steps: none}, false, []string{installed, "weir status"}},
		{"another version of the package", packaged, maintain.InstallReport{Steps: some}, true, []string{nomad, "systemctl restart weir-agent", "weir status"}},
		{"only said", packaged, maintain.InstallReport{Steps: some, DryRun: true}, false, []string{"the same command without -dry-run"}},
	} {
		t.Run(each.name, func(t *testing.T) {
			c := &base.Command{Env: base.Env{Unit: func() bool { return each.unit }}}
			got := maintain.AfterInstall(c, &deploy.Node{Layout: each.layout}, each.report, each.layout == packaged)
			if diff := cmp.Diff(each.want, got); diff != "" {
				t.Errorf("next (-want +got):\n%s", diff)
			}
		})
	}
}

func TestUninstallRefuses(t *testing.T) {
	test.Need(t, test.Root)
	alive := test.NewNetNS(t)
	environment := map[string]string{"WEIR_STATE_DIR": t.TempDir()}
	record := func(id, netns string, mode workload.Mode) inspect.Record {
		return inspect.Record{
			Key: workload.AttachmentID{ContainerID: id, IfName: "eth0"}, NetNS: netns,
			Request: workload.Request{Mode: mode, Job: workload.Job{AllocID: id, ID: "demo", Group: "web"}},
		}
	}
	n := &node{known: []inspect.Record{
		record("0b5d0c1e", alive.Path, workload.ModeTransparent),
		record("1c6e1d2f", alive.Path, workload.ModeDirect),
		record("2d7f2e30", filepath.Join(t.TempDir(), "gone"), workload.ModeTransparent),
	}, removed: []program.Removal{{Kind: program.PinRemoved, Object: "/sys/fs/bpf/weir/maps/origins"}}, bridges: []string{"bridge weir0"}, others: []string{"bridge weir1"}, networks: []cni.Attached{
		{Key: workload.AttachmentID{ContainerID: "0b5d0c1e", IfName: "eth0"}, NetNS: alive.Path},
		{Key: workload.AttachmentID{ContainerID: "3e801f41", IfName: "eth0"}, NetNS: alive.Path, Job: workload.Job{ID: "plain", Group: "web"}},
		{Key: workload.AttachmentID{ContainerID: "4f912052", IfName: "eth0"}, NetNS: filepath.Join(t.TempDir(), "gone")},
	}}
	root := t.TempDir()
	plugin := root + "/opt/cni/bin/weir"
	if err := os.MkdirAll(filepath.Dir(plugin), 0o755); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(filepath.Join(filepath.Dir(programs(t, t.TempDir())), "weir-cni"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(plugin, program, 0o755); err != nil {
		t.Fatal(err)
	}

	got := try(t, n, environment, "uninstall", "-root", root)
	want(t, got, outcome{code: 1, stderr: `weir uninstall: 3 allocations run under Weir:
  0b5d0c1e (job demo, group web)
  1c6e1d2f (job demo, group web)
  3e801f41 (job plain, group web)
With -force they run on, but of a transparent one ` + maintain.LoseTransparent + `.
With -force they run on, but of one that is guarded alone ` + maintain.LoseGuard + `.
With -force they run on, but of one whose network Weir is called for ` + maintain.LoseNetwork + `.
Drain the node instead: nomad node drain -enable -self
One that ended and left its namespace: weir gc
`})
	got = try(t, n, environment, "uninstall", "-root", root, "-dry-run", "-json")
	var report maintain.InstallReport
	if err := json.Unmarshal([]byte(got.stdout), &report); err != nil || len(report.Workloads) != 3 || !report.DryRun {
		t.Errorf("uninstall -dry-run -json = %+v, %v", got, err)
	}
	losses := func() map[string][]string {
		got := try(t, n, environment, "uninstall", "-root", root, "-dry-run", "-json")
		var report maintain.InstallReport
		if err := json.Unmarshal([]byte(got.stdout), &report); err != nil {
			t.Fatal(err, got)
		}
		list := map[string][]string{}
		for _, a := range report.Workloads {
			list[a.ID] = a.Loses
		}
		return list
	}
	wantLosses := map[string][]string{
		"0b5d0c1e": {maintain.LoseTransparent, maintain.LoseNetwork}, "1c6e1d2f": {maintain.LoseGuard}, "3e801f41": {maintain.LoseNetwork},
	}
	if diff := cmp.Diff(wantLosses, losses()); diff != "" {
		t.Errorf("who loses what (-want +got):\n%s", diff)
	}
	// Consul's plugin, which stays, ends what it is called for by Nomad: on the
	// bridge, and not where the plugin itself built the network.
	foreign := filepath.Join(filepath.Dir(plugin), "consul-cni")
	if err := os.WriteFile(foreign, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	n.known[0].Request.Network, n.networks[0].Key.ContainerID = "nomad", "1c6e1d2f"
	wantLosses["0b5d0c1e"], wantLosses["1c6e1d2f"] = []string{maintain.LoseTransparent}, []string{maintain.LoseGuard, maintain.LoseNetwork}
	if diff := cmp.Diff(wantLosses, losses()); diff != "" {
		t.Errorf("who loses what beside Consul's plugin (-want +got):\n%s", diff)
	}
	n.agent = &api.Status{}
	if got := try(t, n, environment, "uninstall", "-root", root, "-force"); got.code != 1 || !strings.Contains(got.stderr, "the agent runs") {
		t.Errorf("while the agent runs: %+v", got)
	}
	if _, err := os.Stat(plugin); err != nil {
		t.Fatalf("plugin after refusals: %v", err)
	}

	n.agent = nil
	got = try(t, n, environment, "uninstall", "-root", root, "-force", "-json")
	report = maintain.InstallReport{}
	if err := json.Unmarshal([]byte(got.stdout), &report); err != nil {
		t.Fatal(err, got)
	}
	removed := false
	for _, step := range report.Steps {
		removed = removed || step.Path == "/opt/cni/bin/weir" && step.Do == deploy.Remove
	}
	if len(report.Remarks) != 1 || !strings.HasPrefix(report.Remarks[0], "bridge weir1 has Weir's mark, but no record in "+environment["WEIR_STATE_DIR"]) {
		t.Errorf("remarks of uninstall = %q, want one on another instance's bridge", report.Remarks)
	}
	if got.code != 0 || len(report.Workloads) != 3 || strings.Join(report.Kernel, ", ") != "pin /sys/fs/bpf/weir/maps/origins, bridge weir0" || !removed {
		t.Errorf("uninstall -force = %+v", got)
	}
	if _, err := os.Stat(plugin); !os.IsNotExist(err) {
		t.Errorf("plugin after the removal: %v", err)
	}
}
