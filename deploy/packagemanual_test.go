// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/test"
)

// packageManual has groff read each page of the deb, where man looks for it, and finds the
// same pages in the tarball. Each command has one.
func packageManual(t *testing.T, deb, tarball string) {
	test.Need(t, test.Tool("groff"))
	tree, unpacked := t.TempDir(), t.TempDir()
	output(t, "dpkg-deb", "-x", deb, tree)
	output(t, "tar", "-xzf", tarball, "-C", unpacked)
	read := func(name string) string {
		t.Helper()
		section := filepath.Ext(name)[1:]
		path := tree + "/usr/share/man/man" + section + "/" + name + ".gz"
		page := output(t, "gzip", "-dc", path)
		plain, err := os.ReadFile(unpacked + "/weir/man/" + name)
		if err != nil || string(plain) != page {
			t.Errorf("%s of the tarball is not that of the deb: %v", name, err)
		}
		groff := exec.Command("groff", "-k", "-t", "-man", "-Tutf8", "-ww", "-P-cbou")
		groff.Stdin = strings.NewReader(page)
		var warnings bytes.Buffer
		groff.Stderr = &warnings
		text, err := groff.Output()
		if err != nil || warnings.Len() > 0 {
			t.Errorf("%s: %v\n%s", name, err, warnings.String())
		}
		return string(text)
	}
	pages, err := filepath.Glob(tree + "/usr/share/man/man*/*.gz")
	if err != nil || len(pages) < 20 {
		t.Fatalf("the deb has %d pages of the manual only, %v", len(pages), err)
	}
	all := make(map[string]string)
	for _, path := range pages {
		name := strings.TrimSuffix(filepath.Base(path), ".gz")
		all[name] = strings.Join(strings.Fields(read(name)), " ")
	}
	for name, want := range map[string]string{
		"weir.1":                 "weir-config-validate(1) Check configuration files",
		"weir-status.1":          "$ weir status -json > status.json || exit 1",
		"weir-config-validate.1": "weir config validate [options]",
		"weir.hcl.5":             "guard.default off, audit, enforce; a job strengthens it, never weakens it; type: string; default: \"audit\"",
		"weir-cni.8":             "weir.guard audit, enforce;",
	} {
		if !strings.Contains(all[name], want) {
			t.Errorf("%s does not say %q:\n%s", name, want, all[name])
		}
	}
	// The program lists its commands on lines that are indented by four.
	help, _ := exec.Command(tree+"/usr/bin/weir", "-help").CombinedOutput() // it exits with 127
	commands := 0
	for line := range strings.Lines(string(help)) {
		if name, found := strings.CutPrefix(line, "    "); found {
			commands++
			name = strings.Fields(name)[0]
			if name == "config" {
				name = "config-validate"
			}
			if all["weir-"+name+".1"] == "" {
				t.Errorf("the manual has no page weir-%s.1", name)
			}
		}
	}
	if commands < 15 {
		t.Errorf("weir -help lists %d commands:\n%s", commands, help)
	}
}

// packageCompletion has each shell complete a line by the deb's file and the deb's program.
func packageCompletion(t *testing.T, deb string) {
	test.Need(t, test.Tool("bash"), test.Tool("zsh"), test.Tool("fish"))
	tree := t.TempDir()
	output(t, "dpkg-deb", "-x", deb, tree)
	for shell, run := range map[string][]string{
		// What "complete -p" prints is the registration; the command in it is what bash runs.
		"bash": {"bash", "-c", `source "$0/bash-completion/completions/weir"; eval "set -- $(complete -p weir)"
			[[ $1 == complete && $2 == -C && $4 == weir ]] && COMP_LINE="weir un" "$3" weir un weir`},
		"zsh":      {"zsh", "-fc", `compadd() { shift; print -l -- "$@" }; words=(weir un); CURRENT=2; source "$0/zsh/vendor-completions/_weir"`},
		"zsh, rpm": {"zsh", "-fc", `compadd() { shift; print -l -- "$@" }; words=(weir un); CURRENT=2; source "$0/zsh/site-functions/_weir"`},
		"fish":     {"fish", "-Nc", `source $argv[1]/fish/vendor_completions.d/weir.fish; complete -C "weir un"`},
	} {
		complete := exec.Command(run[0], append(run[1:], tree+"/usr/share")...)
		complete.Env = append(os.Environ(), "PATH="+tree+"/usr/bin:"+os.Getenv("PATH"), "HOME="+t.TempDir())
		got, err := complete.CombinedOutput()
		words := strings.Fields(string(got))
		slices.Sort(words)
		if diff := cmp.Diff([]string{"uninstall", "unload"}, words); err != nil || diff != "" {
			t.Errorf("%s completes \"weir un\": %v (-want +got):\n%s", shell, err, diff)
		}
	}
}
