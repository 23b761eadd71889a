// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/test"
)

// built are the real programs of this tree.
func built(t *testing.T) Source {
	t.Helper()
	test.Need(t, test.Tool("go"))
	dir := t.TempDir()
	build := exec.Command("go", "build", "-trimpath", "-o", dir, pluginPackage, cliPackage)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return Source{Plugin: filepath.Join(dir, "weir-cni"), CLI: filepath.Join(dir, "weir"), Version: "v1.0.0"}
}

// standIns are programs of the same names that do nothing: small, where many
// installations are made.
func standIns(t *testing.T) Source {
	t.Helper()
	test.Need(t, test.Tool("go"))
	dir := t.TempDir()
	for _, name := range []string{pluginPackage, cliPackage} {
		tree := filepath.Join(dir, "src", filepath.Base(name))
		for file, content := range map[string]string{"go.mod": "module " + name + "\n", "main.go": "package main\n\nfunc main() {}\n"} {
			if err := errors.Join(os.MkdirAll(tree, 0o755), os.WriteFile(filepath.Join(tree, file), []byte(content), 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", dir+"/", ".")
		build.Dir = tree
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build: %v\n%s", err, out)
		}
	}
	return Source{Plugin: filepath.Join(dir, "weir-cni"), CLI: filepath.Join(dir, "weir"), Version: "v1.0.0"}
}

func emptyNode(t *testing.T) Node {
	t.Helper()
	n := Node{Root: t.TempDir(), Layout: DefaultLayout()}
	if err := os.MkdirAll(n.on("/var/lib"), 0o755); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n Node) install(t *testing.T, source Source, replace bool) Steps {
	t.Helper()
	steps, err := n.PlanInstall(source, replace)
	if err != nil {
		t.Fatal(err)
	}
	done, err := steps.Run()
	if err != nil {
		t.Fatal(err)
	}
	return done
}

func (n Node) removeAll(t *testing.T) Steps {
	t.Helper()
	plan, err := n.PlanRemoval()
	if err != nil {
		t.Fatal(err)
	}
	called, err := plan.Called.Run()
	if err != nil {
		t.Fatal(err)
	}
	rest, err := plan.Rest.Run()
	if err != nil {
		t.Fatal(err)
	}
	return append(called, rest...)
}

// put writes a file of a node as somebody else would.
func (n Node) put(t *testing.T, path, content string, mode fs.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(n.on(path)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.on(path), []byte(content), mode); err != nil {
		t.Fatal(err)
	}
}

// tree is everything on a node: mode, and content or target, by path. Of our
// programs it has the name alone.
func (n Node) tree(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(n.Root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == n.Root {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		content := ""
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			content, err = os.Readlink(path)
		case info.Mode().IsRegular() && mainPackage(path) != "":
			content = mainPackage(path)
		case info.Mode().IsRegular():
			var text []byte
			text, err = os.ReadFile(path)
			content = string(text)
		}
		found["/"+strings.TrimPrefix(path, n.Root+"/")] = info.Mode().String() + " " + content
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func want(t *testing.T, what string, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func actions(steps Steps) map[string]Action {
	did := map[string]Action{}
	for _, step := range steps {
		did[step.Path] = step.Do
	}
	return did
}

const foreignPlugin = "#!/bin/sh\necho consul-cni v1.5.0\n"

func TestInstallAndUninstall(t *testing.T) {
	n, source := emptyNode(t), built(t)
	n.put(t, "/opt/cni/bin/bridge", "the reference plugin", 0o755)
	before := n.tree(t)
	n.install(t, source, false)

	after := n.tree(t)
	for path, want := range map[string]string{
		"/opt/cni/bin/weir":               "-rwxr-xr-x " + pluginPackage,
		"/opt/cni/bin/consul-cni":         "Lrwxrwxrwx weir",
		"/usr/local/bin/weir":             "-rwxr-xr-x " + cliPackage,
		"/opt/cni/config/weir.conflist":   "-rw-r--r-- {",
		"/etc/weir.d/weir.hcl":            "-rw------- # The agent's configuration",
		"/etc/systemd/system/" + unitName: "-rw-r--r-- # Weir's agent",
	} {
		if !strings.HasPrefix(after[path], want) {
			t.Errorf("%s is %.60q, want %q", path, after[path], want)
		}
	}
	out, err := exec.Command(n.on("/opt/cni/bin/consul-cni")).Output()
	if err != nil || !strings.HasPrefix(string(out), "consul-cni v1.") {
		t.Errorf("consul-cni says %q, %v; want the version that Nomad asks for", out, err)
	}

	if again := n.install(t, source, false); again.Changes() {
		t.Errorf("a second installation changes something: %v", again)
	}
	want(t, "the node after two installations", n.tree(t), after)
	n.removeAll(t)
	want(t, "the node after the removal", n.tree(t), before)
	if steps := n.removeAll(t); len(steps) > 0 {
		t.Errorf("a second removal does %v", steps)
	}
}

func TestInstallRefusesAForeignPlugin(t *testing.T) {
	n, source := emptyNode(t), standIns(t)
	n.put(t, "/opt/cni/bin/consul-cni", foreignPlugin, 0o750)
	n.put(t, "/etc/weir.d/weir.hcl", "log_level = \"debug\"\n", 0o640)
	before := n.tree(t)

	_, err := n.PlanInstall(source, false)
	if !errors.Is(err, ErrForeign) || !strings.Contains(err.Error(), "/opt/cni/bin/consul-cni") {
		t.Fatalf("error = %v, want one that names consul-cni", err)
	}
	want(t, "the node after the refusal", n.tree(t), before)

	n.install(t, source, true)
	now := n.tree(t)
	want(t, "consul-cni", now["/opt/cni/bin/consul-cni"], "Lrwxrwxrwx weir")
	want(t, "what was set aside", now["/opt/cni/bin/"+savedName], before["/opt/cni/bin/consul-cni"])
	want(t, "the operator's configuration", now["/etc/weir.d/weir.hcl"], before["/etc/weir.d/weir.hcl"])
	if again := n.install(t, source, false); again.Changes() {
		t.Errorf("a second installation changes something: %v", again)
	}
	n.removeAll(t)
	want(t, "the node after the removal", n.tree(t), before)
}

// A plugin of a package is a link to somewhere, and comes back as one.
func TestForeignLinkComesBack(t *testing.T) {
	n, source := emptyNode(t), standIns(t)
	n.put(t, "/opt/consul/consul-cni", foreignPlugin, 0o755)
	n.put(t, "/opt/cni/bin/bridge", "the reference plugin", 0o755)
	if err := os.Symlink("../../consul/consul-cni", n.on("/opt/cni/bin/consul-cni")); err != nil {
		t.Fatal(err)
	}
	before := n.tree(t)
	n.install(t, source, true)
	want(t, "consul-cni", n.tree(t)["/opt/cni/bin/consul-cni"], "Lrwxrwxrwx weir")
	n.removeAll(t)
	want(t, "the node after the removal", n.tree(t), before)
}

// An installation may stop after any step: the next one finishes it, and so
// does a removal. No file is half written and consul-cni is always there.
func TestInstallStopsAfterAnyStep(t *testing.T) {
	source := standIns(t)
	full := emptyNode(t)
	full.put(t, "/opt/cni/bin/consul-cni", foreignPlugin, 0o755)
	before := full.tree(t)
	complete := full.install(t, source, true)
	after := full.tree(t)
	for stop := range complete {
		n := emptyNode(t)
		n.put(t, "/opt/cni/bin/consul-cni", foreignPlugin, 0o755)
		steps, err := n.PlanInstall(source, true)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := steps[:stop].Run(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(n.on("/opt/cni/bin/consul-cni")); err != nil {
			t.Errorf("stopped before %q: %v", steps[stop], err)
		}
		for path, now := range n.tree(t) {
			if now != after[path] && now != before[path] && path != n.manifestPath() {
				t.Errorf("stopped before %q: %s is %.80q", steps[stop], path, now)
			}
		}
		n.install(t, source, true)
		want(t, "the node after a second try", n.tree(t), after)

		n = emptyNode(t)
		n.put(t, "/opt/cni/bin/consul-cni", foreignPlugin, 0o755)
		if steps, err = n.PlanInstall(source, true); err != nil {
			t.Fatal(err)
		}
		if _, err := steps[:stop].Run(); err != nil {
			t.Fatal(err)
		}
		n.removeAll(t)
		want(t, "the node after a removal of a half", n.tree(t), before)
	}
}

// Another version replaces what is its own, and leaves what the operator made of it.
func TestUpgrade(t *testing.T) {
	n, source := emptyNode(t), standIns(t)
	n.install(t, source, false)
	conflist := n.on("/opt/cni/config/weir.conflist")
	n.put(t, "/opt/cni/config/weir.conflist", `{"name": "weir", "mine": true}`, 0o644)
	newer := source
	newer.Version = "v1.1.0"
	newer.Plugin = filepath.Join(t.TempDir(), "weir-cni")
	program, err := os.ReadFile(source.Plugin)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(newer.Plugin, append(program, "newer"...), 0o755); err != nil {
		t.Fatal(err)
	}
	did := actions(n.install(t, newer, false))
	want(t, "plugin", did["/opt/cni/bin/weir"], Replace)
	want(t, "CLI", did["/usr/local/bin/weir"], Keep)
	want(t, "conflist", did["/opt/cni/config/weir.conflist"], Keep)
	if content, err := os.ReadFile(n.on("/opt/cni/bin/weir")); err != nil || !strings.HasSuffix(string(content), "newer") {
		t.Errorf("plugin is not the newer one: %v", err)
	}

	did = actions(n.removeAll(t))
	want(t, "conflist that was changed", did["/opt/cni/config/weir.conflist"], Keep)
	want(t, "its directory", did["/opt/cni/config"], Keep)
	if _, err := os.Stat(conflist); err != nil {
		t.Errorf("conflist that was changed: %v", err)
	}
	for path := range n.tree(t) {
		if mainPackage(n.on(path)) != "" || strings.HasSuffix(path, ".service") {
			t.Errorf("%s is left", path)
		}
	}
}

// What was put in place by hand, before there was an installer, is taken over
// and removed.
func TestInstalledByHand(t *testing.T) {
	n, source := emptyNode(t), standIns(t)
	for path, from := range map[string]string{"/opt/cni/bin/weir": source.Plugin, "/usr/local/bin/weir": source.CLI} {
		program, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		n.put(t, path, string(program)+"older", 0o755)
	}
	if err := os.Symlink("weir", n.on("/opt/cni/bin/consul-cni")); err != nil {
		t.Fatal(err)
	}
	text, err := unit(n.Layout)
	if err != nil {
		t.Fatal(err)
	}
	n.put(t, "/etc/systemd/system/"+unitName, string(text), 0o644)
	plan, err := n.PlanRemoval()
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/opt/cni/bin/weir", "/opt/cni/bin/consul-cni", "/usr/local/bin/weir", "/etc/systemd/system/" + unitName} {
		if did := actions(append(plan.Called, plan.Rest...))[path]; did != Remove {
			t.Errorf("%s: %q, want it removed", path, did)
		}
	}
	did := actions(n.install(t, source, false))
	want(t, "plugin", did["/opt/cni/bin/weir"], Replace)
	want(t, "consul-cni", did["/opt/cni/bin/consul-cni"], Keep)
}

// A package that is upgraded puts its own plugin over the link.
func TestForeignPluginOverTheLink(t *testing.T) {
	n, source := emptyNode(t), standIns(t)
	n.install(t, source, false)
	if err := os.Remove(n.on("/opt/cni/bin/consul-cni")); err != nil {
		t.Fatal(err)
	}
	n.put(t, "/opt/cni/bin/consul-cni", foreignPlugin, 0o755)
	if _, err := n.PlanInstall(source, false); !errors.Is(err, ErrForeign) {
		t.Errorf("error = %v, want ErrForeign", err)
	}
	want(t, "removal", actions(n.removeAll(t))["/opt/cni/bin/consul-cni"], Keep)
	if content, err := os.ReadFile(n.on("/opt/cni/bin/consul-cni")); err != nil || string(content) != foreignPlugin {
		t.Errorf("consul-cni = %q, %v; want it untouched", content, err)
	}
}

func TestLayoutParts(t *testing.T) {
	n, source := emptyNode(t), standIns(t)
	n.Layout = Layout{CNIPath: "/cni/bin", CNIConfig: "/cni/config", Bin: "/opt/weir/bin", Units: "/units", Config: "/conf"}
	n.install(t, source, false)
	text, err := os.ReadFile(n.on("/units/" + unitName))
	if err != nil || !strings.Contains(string(text), "ExecStart=/opt/weir/bin/weir agent -config /conf\n") {
		t.Errorf("unit = %s, %v; want the layout's paths in it", text, err)
	}
	n = emptyNode(t)
	n.Layout.Units, n.Layout.Config, n.Layout.Bin = "", "", ""
	n.install(t, source, false)
	for path := range n.tree(t) {
		if strings.HasPrefix(path, "/etc") || strings.HasPrefix(path, "/usr") {
			t.Errorf("%s is there, but its part was left out", path)
		}
	}
	for _, wrong := range []Layout{{CNIPath: "opt/cni/bin"}, {CNIPath: "/opt/cni/bin:/usr/libexec/cni"}, {CNIPath: "/bin", Bin: "/bin/"}} {
		if err := wrong.Validate(); err == nil {
			t.Errorf("layout %+v is valid", wrong)
		}
	}
}

func TestSourceMustBeOurs(t *testing.T) {
	n, source := emptyNode(t), standIns(t)
	source.Plugin, source.CLI = source.CLI, source.Plugin
	if _, err := n.PlanInstall(source, false); err == nil || !strings.Contains(err.Error(), "is not weir-cni") {
		t.Errorf("error = %v, want one that says what the file is not", err)
	}
}

func TestRemarks(t *testing.T) {
	n := emptyNode(t)
	n.put(t, "/opt/cni/config/10-half.conflist", `{"name": "ha`, 0o644)
	n.put(t, "/opt/cni/config/20-upper.conflist", `{"name": "Upper"}`, 0o644)
	n.put(t, "/opt/cni/config/README", `not read`, 0o644)
	remarks := strings.Join(n.Remarks(), "\n")
	if strings.Count(remarks, "\n") != 1 || !strings.Contains(remarks, "10-half.conflist cannot be read") || !strings.Contains(remarks, `"Upper"`) {
		t.Errorf("remarks = %s; want one on each of two files", remarks)
	}
}
