// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/weirmesh/weir/test"
)

// cli is the program that an operator has on the node, as it is built.
type cli struct {
	t      *testing.T
	binary string
	env    []string // where the node keeps its state
}

func (n *meshNode) buildCLI() cli {
	n.t.Helper()
	c := cli{t: n.t, binary: filepath.Join(n.dir, "weir"), env: append(os.Environ(),
		"WEIR_PIN_DIR="+n.config.PinDir, "WEIR_STATE_DIR="+n.config.StateDir, "WEIR_CGROUP_ROOT="+n.config.CgroupRoot)}
	goBuild(n.t, ".", c.binary, "github.com/weirmesh/weir/cmd/weir")
	return c
}

// goBuild builds a program of the module that is in the directory.
func goBuild(t *testing.T, dir, path, source string) {
	t.Helper()
	test.Need(t, test.Tool("go"))
	build := exec.Command("go", "build", "-trimpath", "-o", path, source)
	build.Dir, build.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", source, err, out)
	}
}

// run calls the program as a script does, and returns what it printed and its exit code.
func (c cli) run(args ...string) (stdout, stderr string, code int) {
	c.t.Helper()
	command := exec.Command(c.binary, args...)
	command.Env = c.env
	out, err := command.Output()
	exit := new(exec.ExitError)
	if errors.As(err, &exit) {
		return string(out), string(exit.Stderr), exit.ExitCode()
	}
	if err != nil {
		c.t.Fatalf("weir %q: %v", args, err)
	}
	return string(out), "", 0
}
