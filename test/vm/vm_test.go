// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMirrorsComeFromAptsSources(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "sources.list"), "# deb http://no.example/debian\ndeb [arch=amd64 signed-by=/k] http://b.example/debian/ bookworm main\ndeb-src http://no.example/debian x main\n")
	write(t, filepath.Join(dir, "sources.list.d", "debian.sources"), "Types: deb\nURIs: http://a.example/debian https://c.example/debian-security/\nSuites: bookworm\n")
	write(t, filepath.Join(dir, "sources.list.d", "old.list.disabled"), "deb http://no.example/ x main\n")
	got, err := mirrorsFromSources(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"http://a.example/debian", "https://c.example/debian-security", "http://b.example/debian"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got, err := mirrorsFromSources(t.TempDir()); err == nil {
		t.Errorf("mirrors of a machine without apt = %v, want an error", got)
	}
}

const index = `Package: linux-image-cloud-amd64
Version: 7.9-2
Depends: linux-image-7.9-cloud-amd64 (= 7.9-2), linux-base-cloud-amd64 (= 7.9-2)
Filename: pool/meta.deb

Package: linux-image-7.9-cloud-amd64
Version: 7.9-2
Depends: dracut | initramfs-tools (>= 0.1), linux-modules-7.9-cloud-amd64 (= 7.9-2)
Description: a kernel
 that boots

Package: linux-modules-7.9-cloud-amd64
Version: 7.9-2
SHA256: aa

Package: linux-modules-7.9-cloud-amd64
Version: 7.9-10
SHA256: bb
`

func TestClosureTakesTheNewestAndOnlyTheWanted(t *testing.T) {
	all := catalog{}
	if err := parsePackages(strings.NewReader(index), "http://a.example", all); err != nil {
		t.Fatal(err)
	}
	parts, err := closure(context.Background(), all, []string{"linux-image-cloud-amd64"}, func(name string) bool {
		return strings.HasPrefix(name, "linux-image-") || strings.HasPrefix(name, "linux-modules-")
	})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range parts {
		got = append(got, p.name+" "+p.version)
	}
	want := []string{"linux-image-cloud-amd64 7.9-2", "linux-image-7.9-cloud-amd64 7.9-2", "linux-modules-7.9-cloud-amd64 7.9-10"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if parts[2].sha256 != "bb" {
		t.Errorf("checksum of the newest = %q, want that of its own stanza", parts[2].sha256)
	}
	if _, err := closure(context.Background(), all, []string{"absent"}, func(string) bool { return true }); err == nil {
		t.Error("closure with a package that the index lacks succeeded")
	}
}

func TestReleaseSumIsOfSHA256(t *testing.T) {
	file := filepath.Join(t.TempDir(), "Release")
	write(t, file, "MD5Sum:\n 11 5 main/Packages.xz\nSHA256:\n 22 5 contrib/Packages.xz\n 33 5 main/Packages.xz\n")
	if got, err := releaseSum(file, "main/Packages.xz"); got != "33" || err != nil {
		t.Errorf("sum = %q, %v; want 33", got, err)
	}
	if got, err := releaseSum(file, "absent"); err == nil {
		t.Errorf("sum of a file that is not listed = %q, want an error", got)
	}
}

func TestCpioHasParentsAndAnOpenRoot(t *testing.T) {
	var image bytes.Buffer
	c := newCpio(&image)
	c.executable("/a/b/run", []byte("12345"))
	c.data("/a/b/run", []byte("a second one is not written"))
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	type entry struct{ Name, Mode, Data string }
	var got []entry
	for rest := image.String(); len(rest) >= 110; {
		size, name := number(rest[54:62]), number(rest[94:102])
		data := align(110 + name)
		got = append(got, entry{rest[110 : 110+name-1], rest[14:22], rest[data : data+size]})
		rest = rest[align(data+size):]
	}
	want := []entry{{".", "000041ed", ""}, {"a", "000041ed", ""}, {"a/b", "000041ed", ""}, {"a/b/run", "000081ed", "12345"}, {"TRAILER!!!", "00000000", ""}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestSkipAndSilenceAreFailures(t *testing.T) {
	ended := &guestExit{}
	for name, tc := range map[string]struct {
		output string
		exit   *guestExit
		want   []string
	}{
		"pass":    {"\x16=== RUN   TestA\n\x16=== RUN   TestA/b\n\x16--- PASS: TestA (0.01s)\n    \x16--- PASS: TestA/b (0.01s)\n\x16PASS\n", ended, nil},
		"skip":    {"\x16=== RUN   TestA\n\x16--- SKIP: TestA (0.00s)\n\x16PASS\n", ended, []string{"1 skipped"}},
		"fail":    {"\x16=== RUN   TestA\n\x16--- FAIL: TestA (0.00s)\n\x16FAIL\n", &guestExit{Status: 1}, []string{"1 failed"}},
		"nothing": {"\x16PASS\n", ended, []string{"no test ran"}},
		"died":    {"\x16=== RUN   TestA\n\x16--- PASS: TestA (0.00s)\n", nil, []string{"1 without a result", "did not finish"}},
		"leaked":  {"\x16=== RUN   TestA\n\x16--- PASS: TestA (0.00s)\n\x16PASS\n", &guestExit{Status: 2}, []string{"exit status 2"}},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := readResult(t.Context(), "p", []byte(tc.output), tc.exit, false)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, r.complaints()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestTableGoesBetweenItsMarkers(t *testing.T) {
	readme := filepath.Join(t.TempDir(), "README.md")
	write(t, readme, "before\n"+tableBegin+"\nold\n"+tableEnd+"\nafter\n")
	result := func(release, report string) kernelResult {
		return kernelResult{accel: "kvm", image: image{release: release}, packages: []packageResult{
			{tests: 1, passed: []string{"TestReport"}, exit: &guestExit{}, output: map[string]string{"TestReport": report}},
		}}
	}
	results := []kernelResult{
		result("6.1", reportMark+`{"program":"connect4","instructions":1200,"load_millis":1.25,"memory":4096}`+"\n"),
		result("7.2", reportMark+`{"program":"connect4","instructions":900,"load_millis":1,"memory":4096}`+"\n"+reportMark+`{"program":"maps","memory":3145728}`+"\n"),
	}
	if err := writeTable(readme, results); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"before\n" + tableBegin + "\n", "\n" + tableEnd + "\nafter\n", "| program | 6.1 | 7.2 |\n|---|---|---|\n",
		"| connect4 | 1200, 1.2 ms, 4.0 KiB | 900, 1.0 ms, 4.0 KiB |\n", "| maps | - | 3.0 MiB |\n",
	} {
		if !strings.Contains(string(text), want) {
			t.Errorf("README lacks %q:\n%s", want, text)
		}
	}
	if strings.Contains(string(text), "old") {
		t.Error("the old table stayed")
	}
}

func TestKernelComplaintsAreFound(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	write(t, log, "[ 1.0] Linux\n[ 2.0] WARNING: CPU: 1 PID: 7 at kernel/bpf/verifier.c:1 f+0x1\n[ 3.0] watchdog: BUG: soft lockup - CPU#0\n"+
		"[ 4.0] WARNING: kernel/time/hrtimer.c:1052 at hrtimer_forward+0xb2\n")
	got, err := kernelComplaints(log)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"[ 2.0] WARNING: CPU: 1 PID: 7 at kernel/bpf/verifier.c:1 f+0x1"}, got); diff != "" {
		t.Error(diff)
	}
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func number(hex string) int {
	n := 0
	for _, digit := range hex {
		n = n*16 + strings.IndexRune("0123456789abcdef", digit)
	}
	return n
}

func align(n int) int { return (n + 3) &^ 3 }
