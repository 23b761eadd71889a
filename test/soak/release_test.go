// SPDX-License-Identifier: MPL-2.0

package soak

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test"
)

// release is a state of this tree in git that operators may run. A clone may have come
// without tags, so that its revision is told as well.
type release struct {
	name, revision string
	restoresBare   bool // makes a lost record anew without what Consul says, which it adds later
}

// releases are those that this tree is upgraded from in the tests: the last one, and the
// last revision with layout 6 of the maps, from which the layout changes too.
func releases() [2]release {
	return [2]release{
		{name: "v0.1.0", revision: "4b34aee68df076ff5cf09f79e96a330578c530db"},
		{name: "layout-6", revision: "6cb8a7e8d997e2911d98046179e3728536bbf96b", restoresBare: true},
	}
}

// TestReleasesHaveTheLastTag fails where a release was made and nobody upgrades from it.
// A clone without tags cannot say.
func TestReleasesHaveTheLastTag(t *testing.T) {
	root, last := repository(t), releases()[0]
	if tag, err := git(root, "describe", "--tags", "--abbrev=0", "--match", "v*", "HEAD^"); err == nil && tag != last.name {
		t.Errorf("the last release is %s, the tests upgrade from %s", tag, last.name)
	}
	if revision, err := git(root, "rev-parse", "--verify", last.name+"^{commit}"); err == nil && revision != last.revision {
		t.Errorf("%s is %s, the tests take %s for it", last.name, revision, last.revision)
	}
}

// version is a build of Weir: the directory with its weir and weir-cni.
type version struct {
	release
	dir string
}

func (v version) weir() string   { return filepath.Join(v.dir, "weir") }
func (v version) plugin() string { return filepath.Join(v.dir, "weir-cni") }

// thisTree builds what the test is part of.
func thisTree(t *testing.T) version {
	t.Helper()
	v := version{release{name: "this tree"}, t.TempDir()}
	v.build(t, repository(t))
	return v
}

// build builds the release out of git.
func (r release) build(t *testing.T) version {
	t.Helper()
	root := repository(t)
	if _, err := git(root, "cat-file", "-e", r.revision+"^{commit}"); err != nil {
		t.Fatalf("%s, which is %s, is not in this clone: %v\nfetch the whole history: git fetch --unshallow, or fetch-depth: 0 where CI makes the clone",
			r.name, r.revision, err)
	}
	v, source := version{r, t.TempDir()}, t.TempDir()
	command := exec.Command("sh", "-c", `git -C "$0" archive "$1" | tar -x -C "$2"`, root, r.revision, source)
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("take the sources of %s out of git: %v: %s", r.name, err, out)
	}
	v.build(t, source)
	return v
}

func (v version) build(t *testing.T, source string) {
	t.Helper()
	test.Need(t, test.Tool("go"))
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-X main.version="+strings.ReplaceAll(v.name, " ", "-"), "-o", v.dir, "./cmd/weir", "./cmd/weir-cni")
	build.Dir, build.Env = source, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", v.name, err, out)
	}
}

// repository is the directory of go.mod.
func repository(t *testing.T) string {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func git(dir string, args ...string) (string, error) {
	text, err := exec.Command("git", append([]string{"-C", dir}, args...)...).Output()
	return strings.TrimSpace(string(text)), err
}
