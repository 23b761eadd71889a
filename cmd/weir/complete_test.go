// SPDX-License-Identifier: MPL-2.0

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// completions asks the program, as bash does, how the line goes on.
func completions(t *testing.T, n *node, line string) []string {
	t.Helper()
	t.Setenv("COMP_LINE", line)
	file, err := os.Create(filepath.Join(t.TempDir(), "stdout"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	stdout := os.Stdout // the library writes there
	os.Stdout = file
	got := try(t, n, nil, "weir", "", "weir") // the arguments that bash gives mean nothing
	os.Stdout = stdout
	want(t, got, outcome{})
	text, err := os.ReadFile(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(text))
}

func TestCompletion(t *testing.T) {
	n := &node{known: []inspect.Record{
		{Key: workload.AttachmentID{ContainerID: "0b5d0c1e-7c0f"}, Request: workload.Request{Job: workload.Job{ID: "demo"}}},
		{Key: workload.AttachmentID{ContainerID: "1c6e1d2f-8d1a"}, Request: workload.Request{Job: workload.Job{ID: "demo"}}},
	}}
	for _, c := range []struct {
		line string
		want []string
	}{
		{"weir wor", []string{"workloads"}},
		{"weir un", []string{"uninstall", "unload"}},
		{"weir workloads ", []string{"0b5d0c1e-7c0f", "1c6e1d2f-8d1a", "demo"}},
		{"weir verdicts 0", []string{"0b5d0c1e-7c0f"}},
		{"weir events -f d", []string{"demo"}},
		{"weir events -d", []string{"-duration"}},
		{"weir status ", nil},
		{"weir -autocomplete-", []string{"-autocomplete-install", "-autocomplete-uninstall"}},
	} {
		got := completions(t, n, c.line)
		slices.Sort(got)
		if !slices.Equal(got, c.want) {
			t.Errorf("%q goes on with %q, want %q", c.line, got, c.want)
		}
	}
	n.err = os.ErrPermission // what a user may not read is not offered, without a word
	if got := completions(t, n, "weir workloads "); len(got) > 0 {
		t.Errorf("without permission: %q", got)
	}
}

// The real program writes the line into the real file of the shell, for a user who has one of their own.
func TestAutocompleteInstall(t *testing.T) {
	test.Need(t, test.Root) // to be that user
	const nobody = 61184    // no such user: home is what the environment says
	home, err := os.MkdirTemp("", "weir-home")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(home) })
	program, rc := filepath.Join(home, "weir"), filepath.Join(home, ".bashrc")
	build := exec.Command("go", "build", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as it is released
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	for _, err := range []error{
		os.WriteFile(rc, nil, 0o600), os.Chown(rc, nobody, nobody), os.Chown(home, nobody, nobody), os.Chmod(home, 0o700),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	weir := func(flag string) string {
		command := exec.Command(program, flag)
		command.Env = []string{"HOME=" + home, "USER=tester", "PATH=/usr/bin:/bin"}
		command.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		if out, err := command.CombinedOutput(); err != nil {
			t.Fatalf("weir %s: %v: %s", flag, err, out)
		}
		text, err := os.ReadFile(rc)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	if got := weir("-autocomplete-install"); !strings.Contains(got, "complete -C "+program+" weir\n") {
		t.Errorf(".bashrc after -autocomplete-install: %q", got)
	}
	if got := weir("-autocomplete-uninstall"); strings.Contains(got, "complete") {
		t.Errorf(".bashrc after -autocomplete-uninstall: %q", got)
	}
}
