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

// firstRelease stands for the last release until there is a tag: the last revision with
// layout 6 of the maps, so that an upgrade is one of the layout too.
const firstRelease = "6cb8a7e8d997e2911d98046179e3728536bbf96b"

// version is a build of Weir: the directory with its weir and weir-cni.
type version struct{ name, dir string }

func (v version) weir() string   { return filepath.Join(v.dir, "weir") }
func (v version) plugin() string { return filepath.Join(v.dir, "weir-cni") }

// thisTree builds what the test is part of.
func thisTree(t *testing.T) version {
	t.Helper()
	v := version{"this tree", t.TempDir()}
	v.build(t, repository(t))
	return v
}

// lastRelease builds the last tag that is not this commit, else what stands for it.
func lastRelease(t *testing.T) version {
	t.Helper()
	root := repository(t)
	revision, err := git(root, "describe", "--tags", "--abbrev=0", "--match", "v*", "HEAD^")
	if err != nil {
		revision = firstRelease
	}
	if _, err := git(root, "cat-file", "-e", revision+"^{commit}"); err != nil {
		t.Fatalf("the last release, %s, is not in this clone: %v\nfetch the whole history: git fetch --unshallow --tags, or fetch-depth: 0 where CI makes the clone",
			revision, err)
	}
	v := version{revision, t.TempDir()}
	source := t.TempDir()
	command := exec.Command("sh", "-c", `git -C "$0" archive "$1" | tar -x -C "$2"`, root, revision, source)
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("take the sources of %s out of git: %v: %s", revision, err, out)
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
