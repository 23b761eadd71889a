// SPDX-License-Identifier: MPL-2.0

package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// What somebody reads of a run is its end: what was not run and why, and then, last of
// all, what failed.
func TestSummaryOfARun(t *testing.T) {
	Need(t, Tool("bash"), Tool("awk"))
	const passed = `=== RUN   TestA
    skip.go:74: needs root: user ID is 1000, not 0
--- SKIP: TestA (0.00s)
=== RUN   TestB
=== RUN   TestB/x
    b_test.go:9: needs root: user ID is 1000, not 0
    --- SKIP: TestB/x (0.00s)
--- PASS: TestB (0.00s)
=== RUN   TestC
    c_test.go:3: needs tool nft: no such file
--- SKIP: TestC (0.00s)
PASS
ok  	github.com/weirmesh/weir/agent	0.1s
`
	const failed = `=== RUN   TestD
    d_test.go:3: boom
--- FAIL: TestD (0.00s)
FAIL
FAIL	github.com/weirmesh/weir/cni	0.1s
# github.com/weirmesh/weir/deploy
deploy/x.go:1:1: undefined: x
FAIL	github.com/weirmesh/weir/deploy [build failed]
panic: test timed out after 10m0s
FAIL	github.com/weirmesh/weir/redirect	600s
ok  	github.com/weirmesh/weir/test	0.1s
FAIL
`
	const notRun = `not run:
  2 tests: needs root: user ID is 1000, not 0
  TestC: needs tool nft: no such file
  the race detector: no compiler
`
	for _, c := range []struct{ name, log, ci, want string }{
		{"all is well", passed, "", "1 passed, 0 failed, 3 skipped\n" + notRun},
		{"in CI", passed, "true", "1 passed, 0 failed, 3 skipped\n" + notRun +
			"failed:\n  3 tests were skipped, which is a failure in CI\nexit status 1\n"},
		{"with failures", passed + failed, "", "1 passed, 1 failed, 3 skipped\n" + notRun +
			"failed:\n  cni: TestD\n      d_test.go:3: boom\n  deploy: [build failed]\n  redirect: panic: test timed out after 10m0s\nexit status 1\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			log := filepath.Join(t.TempDir(), "log")
			if err := os.WriteFile(log, []byte(c.log), 0o600); err != nil {
				t.Fatal(err)
			}
			summary := exec.Command("./summary.sh", log, "the race detector: no compiler")
			summary.Env = append(os.Environ(), "CI="+c.ci)
			out, err := summary.CombinedOutput()
			got := string(out)
			if err != nil {
				got += err.Error() + "\n"
			}
			if got != c.want {
				t.Errorf("summary:\n%s\nwant:\n%s", got, c.want)
			}
			if strings.Contains(c.log, "FAIL") && err == nil {
				t.Error("a run with failures has status 0")
			}
		})
	}
}
