// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
)

// buildEngine builds the stand-in for consul-cni: it calls Consul's own engine as
// consul-cni does. It is of the module of the benchmarks, which need it too.
func buildEngine(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "engine")
	cmd := exec.Command("go", "build", "-trimpath", "-o", file, "./engine")
	cmd.Dir, cmd.Env = "../../bench", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build Consul's engine: %v: %s", err, out)
	}
	return file
}

// refused runs a command that must fail and returns what it said.
func refused(t *testing.T, n *nomad.Node, name string, args ...string) string {
	t.Helper()
	out, err := n.Try(name, args...)
	var code *nomad.CommandError
	if !errors.As(err, &code) {
		t.Fatalf("%s %q: %v: %s; want it to refuse", name, args, err, out)
	}
	return code.Text + out
}

// TestMigration puts Weir in the place of consul-cni under a running allocation, and
// takes it away again.
func TestMigration(t *testing.T) {
	engine := buildEngine(t)
	n := nomad.Start(t, nomad.Options{NoDocker: true, Plugin: engine})
	const file = "testdata/jobs/life-mesh.nomad.hcl"
	old := runMesh(n, file, "old", "bridge")
	wantMesh(t, old.client.EventuallyGet("client", old.url, nil), old.server, "old-client")
	tasks := func() map[string]int {
		return map[string]int{
			"client": old.client.PID("client"), "its proxy": old.client.PID("connect-proxy-old-client"),
			"server": old.server.PID("server"), "its proxy ": old.server.PID("connect-proxy-old-server"),
		}
	}
	before, netns := tasks(), inode(t, old.client.NetNS("client"))
	loop := old.client.Loop("client", old.url)

	if said := refused(t, n, "weir", "install"); !strings.Contains(said, "-replace") || !strings.Contains(said, "consul-cni") {
		t.Errorf("weir install said %q, want it to name consul-cni and -replace", said)
	}
	n.Command("weir", "install", "-replace")
	n.Nomad.Restart(t)
	if version := n.Attributes()["plugins.cni.version.consul-cni"]; version == "v1.4.2" {
		t.Errorf("consul-cni is still the old one, %s", version)
	}

	// Old ones go on as they are, new ones use Weir, and both talk.
	fresh := runMesh(n, file, "fresh", "bridge")
	fresh.wantWorks(t)
	wantMesh(t, fresh.client.EventuallyGet("client", old.url, nil), old.server, "fresh-client")
	wantMesh(t, old.client.EventuallyGet("client", fresh.url, nil), fresh.server, "old-client")
	loop.Await(5, "answered by Consul's rules", old.inMesh)
	old.wantNothingLost(t, "old", loop.Stop())
	for task, pid := range tasks() {
		if pid != before[task] {
			t.Errorf("%s was process %d, is %d", task, before[task], pid)
		}
	}
	if now := inode(t, old.client.NetNS("client")); now != netns {
		t.Errorf("namespace of the old allocation was %d, is %d", netns, now)
	}
	// "weir workloads" lists them with what redirects them.
	test.Eventually(t, func() error {
		listed := n.Command("weir", "workloads")
		for _, a := range []*nomad.Alloc{old.client, old.server} {
			row := regexp.MustCompile(`(?m)^`+a.ID[:8]+` .*$`).FindAllString(listed, -1)
			if len(row) != 1 || !regexp.MustCompile(`^\S+ +old +\S+ +no +consul `).MatchString(row[0]) {
				return fmt.Errorf("of %s it says %q", a.ID, row)
			}
		}
		return nil
	}, "the old allocations to be listed as redirected by Consul's rules")

	// Back: not while it protects, then for good.
	n.Agent.Stop(t)
	said := refused(t, n, "weir", "uninstall")
	for _, want := range []string{fresh.client.ID, fresh.server.ID, "-force", "do not reach Envoy"} {
		if !strings.Contains(said, want) {
			t.Errorf("weir uninstall said %q, want %q in it", said, want)
		}
	}
	for _, a := range []*nomad.Alloc{old.client, old.server} {
		if strings.Contains(said, a.ID) {
			t.Errorf("weir uninstall names %s, which it does not protect: %s", a.ID, said)
		}
	}
	fresh.wantWorks(t)
	fresh.job.Stop()
	// Nomad ends an allocation's network a moment after its tasks.
	test.Eventually(t, func() error {
		if out, err := n.Try("weir", "uninstall"); err != nil {
			return fmt.Errorf("weir uninstall: %w: %s", err, out)
		}
		return nil
	}, "weir to be uninstalled")
	want, err := os.ReadFile(engine)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(n.Path("/opt/cni/bin/consul-cni")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("consul-cni is not the one that was there: %d bytes, want %d; %v", len(got), len(want), err)
	}
	for _, path := range []string{"/opt/cni/bin/weir", "/opt/cni/config/weir.conflist", "/sys/fs/bpf/weir", "/run/weir", "/usr/local/bin/weir"} {
		if _, err := os.Lstat(n.Path(path)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	n.Nomad.Restart(t)
	again := runMesh(n, file, "again", "bridge")
	wantMesh(t, again.client.EventuallyGet("client", old.url, nil), old.server, "again-client")
	wantMesh(t, old.client.EventuallyGet("client", again.url, nil), again.server, "old-client")
}
