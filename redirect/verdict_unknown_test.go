// SPDX-License-Identifier: MPL-2.0

//go:build !guest

package redirect

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// compileChanged compiles a program of ../bpf with one piece of the sources
// replaced by another.
func compileChanged(t *testing.T, prog, old, changed string) []byte {
	t.Helper()
	test.Need(t, test.Tool("clang"))
	dir := t.TempDir()
	sources, err := filepath.Glob("../bpf/*.[ch]")
	if err != nil {
		t.Fatal(err)
	}
	replaced := 0
	for _, path := range sources {
		source, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if base := filepath.Base(path); base == prog || filepath.Ext(base) == ".h" {
			replaced += bytes.Count(source, []byte(old))
			source = bytes.ReplaceAll(source, []byte(old), []byte(changed))
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(path)), source, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if replaced == 0 {
		t.Fatalf("%s has no %q", prog, old)
	}
	object := filepath.Join(dir, "changed.o")
	out, err := exec.Command("clang", "-target", "bpfel", "-O2", "-g", "-mcpu=v3",
		"-I/usr/include/x86_64-linux-gnu", "-I/usr/include/aarch64-linux-gnu",
		"-c", filepath.Join(dir, prog), "-o", object).CombinedOutput()
	if err != nil {
		t.Fatalf("compile %s: %v\n%s", prog, err, out)
	}
	code, err := os.ReadFile(object)
	if err != nil {
		t.Fatal(err)
	}
	return code
}

// A rule that returns a verdict which nobody thought of, as a rule of tomorrow
// may, refuses the connection; it does not let it pass.
func TestUnknownVerdictRefuses(t *testing.T) {
	const unknown = "(enum verdict)(VERDICT_MAX + 1)"
	connect := compileChanged(t, "redirect.c", "return VERDICT_PORT_EXCLUDED;", "return "+unknown+";")
	lookup := compileChanged(t, "lookup.c", "return VERDICT_INBOUND_EXCLUDED;", "return "+unknown+";")
	t.Cleanup(bpfmap.SwapObjects(connect, lookup))

	n := newNode(t)
	a := n.newAlloc()
	a.add(full)
	a.startProxy()
	a.works()
	p := a.task(t)
	excluded4, excluded6 := addrPort(remote4(a.number), 25), addrPort(remote6(a.number), 25)
	test.Echo(t, n.remote, "tcp", "[::]:25")
	for _, s := range []script{
		stream(unix.AF_INET).connect(excluded4),
		stream(unix.AF_INET6).connect(excluded6),
		stream(unix.AF_INET6).to("connectLater", excluded4),
	} {
		p.run(t, s.fails(unix.ENETUNREACH))
	}
	a.serve(taskUID, a.taskCg, "tcp", "[::]:8080")
	a.refused(a.v4, 8080)
	a.refused(a.v6, 8080)
}
