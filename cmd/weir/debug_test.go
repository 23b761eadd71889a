// SPDX-License-Identifier: MPL-2.0

package main

import (
	"archive/tar"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/store"
)

// unpacked are the files of an archive by name, without its directory.
func unpacked(t *testing.T, path string) map[string]string {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	pack, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	files := make(map[string]string)
	for archive := tar.NewReader(pack); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		dir, name, found := strings.Cut(header.Name, "/")
		if !found || !strings.HasPrefix(dir, "weir-debug-") || header.Mode != 0o600 || header.Typeflag != tar.TypeReg {
			t.Errorf("entry %+v", header)
		}
		files[name] = string(content)
	}
}

// The names and values of secrets are found wherever an operator may have put them, and
// none is in the archive, however it is written and whoever told it.
func TestDebugHasNoSecret(t *testing.T) {
	secrets := map[string]string{
		"token in the configuration": "8a7b6c5d-config-token", "token that is commented out": "old-token-1234", "token file": "file-token\\with \"marks\" & more/",
		"variable": "env-token-9876", "of the agent's environment": "agent-env-5555", "password in the address": "pass-in-url", "basic authentication": "http-auth-word",
	}
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	tokenFile := write("token", secrets["token file"]+"\n")
	config := filepath.Dir(write("weir.d/weir.hcl", `consul {
  token      = "`+secrets["token in the configuration"]+`"
  # token    = "`+secrets["token that is commented out"]+`"
  token_file = "`+tokenFile+`"
  address    = "https://user:`+secrets["password in the address"]+`@consul.example:8501"
}
log_level = "token = \"`+secrets["token that is commented out"]+`\""
`))
	n := busy()
	n.proc, n.traffic.Agent.PID = dir, 7
	write("7/environ", "PATH=/bin\x00SOME_TOKEN="+secrets["of the agent's environment"]+"\x00") // the agent's, as its traffic says
	var all []string
	for _, secret := range secrets {
		all = append(all, secret, url.QueryEscape(secret), base64.StdEncoding.EncodeToString([]byte(secret)), strconv.Quote(secret))
	}
	told := strings.Join(all, " ") + " PATH=/bin"
	n.status = healthy()
	n.status.Problems = []health.Problem{{Code: "table-full", What: told, Remedy: "r"}}
	n.log = "10:00 " + told
	n.recording, n.flows = true, fourFlows().flows
	n.flows[0].Destination.Service = told
	n.guard, n.changes = &api.GuardList{Schema: 1}, &api.ChangeList{Changes: []api.Change{{What: told}}}
	n.agent = &api.Status{Workloads: []api.WorkloadView{{ID: "none/../" + secrets["variable"], State: api.StateManaged, Problems: n.status.Problems}}}
	environment := map[string]string{"CONSUL_HTTP_TOKEN": "", "NOMAD_TOKEN": secrets["variable"], "CONSUL_HTTP_AUTH": "user:" + secrets["basic authentication"]}
	out := filepath.Join(dir, "out.tar.gz")
	got := try(t, n, environment, "debug", "-o", out, "-config", config, "-log", "5")
	if got.code != 0 || got.stderr != "" {
		t.Fatalf("weir debug = %+v", got)
	}
	files := unpacked(t, out)
	for name, content := range files {
		for what, secret := range secrets {
			quoted, err := json.Marshal(secret)
			if err != nil {
				t.Fatal(err)
			}
			for _, form := range []string{
				secret, url.QueryEscape(secret), base64.StdEncoding.EncodeToString([]byte(secret)), strings.Trim(string(quoted), `"`), strings.Trim(strconv.Quote(secret), `"`),
			} {
				if strings.Contains(content, form) || strings.Contains(name, form) {
					t.Errorf("%s has the %s as %q", name, what, form)
				}
			}
		}
	}
	for name, want := range map[string]string{
		"status.txt": "[removed] [removed]", "status.json": "[removed] [removed]", "changes.json": "[removed] [removed]", "agent.log": "10:00 [removed]", "flows.json": "[removed] [removed]",
		"config.json": `"Token": "[removed]"`,
	} {
		if !strings.Contains(files[name], want) || name == "agent.log" && !strings.Contains(files[name], "PATH=/bin") {
			t.Errorf("%s has no %q:\n%s", name, want, files[name])
		}
	}
}

// An archive has what the commands tell, says what could not be had, and is root's.
func TestDebug(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	n := busy()
	n.status, n.log, n.recording, n.flows, n.guard = healthy(), "log\n", true, fourFlows().flows, &api.GuardList{Schema: 1}
	n.agent, n.changes = &api.Status{}, changed().changes
	got := try(t, n, nil, "debug", "-config", dir)
	found, err := filepath.Glob("weir-debug-*-*Z.tar.gz")
	if err != nil || len(found) != 1 || got.code != 0 {
		t.Fatalf("%+v, %q, %v: want one archive", got, found, err)
	}
	if !strings.HasPrefix(got.stdout, found[0]+": 16 files\nIt has names, addresses and processes of this node, no payload and no token: ") {
		t.Errorf("it says %q", got.stdout)
	}
	if info, err := os.Stat(found[0]); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode = %v, %v", info.Mode(), err)
	}
	files := unpacked(t, found[0])
	for name, want := range map[string]string{
		"version.json": `"schema": 1`, "status.txt": "healthy: 2 workloads\n\npins ", "status.json": `"loaded": true`, "doctor.txt": "", "doctor.json": `"checks"`,
		"workloads.txt": "no workloads", "workloads.json": `"schema": 1`, "verdicts.json": `"redirected"`, "guard.json": `"schema": 1`,
		"flows.json": `"verdict":"upstream"`, "changes.json": `"kind": "problem"`, "top.json": `"job":"shop"`, "config.txt": ": valid: ", "config.json": `"Default": "audit"`, "system.json": `"kernel"`, "agent.log": "log\n",
	} {
		if content, there := files[name]; !there || !strings.Contains(content, want) {
			t.Errorf("%s = %q, want %q in it", name, content, want)
		}
		delete(files, name)
	}
	if diff := cmp.Diff(map[string]string{}, files); diff != "" {
		t.Errorf("other files (-want +got):\n%s", diff)
	}
	// What is there already is not written over.
	want(t, try(t, n, nil, "debug", "-o", found[0]), outcome{code: 1, stderr: "weir debug: write archive: open " + found[0] + ": file exists\n"})

	silent := &node{noLog: errors.New("read the agent's log by journalctl: not there"), status: healthy()}
	got = try(t, silent, nil, "debug", "-o", "without-agent.tar.gz", "-config", dir)
	if got.code != 0 || !strings.Contains(got.stdout, "\n4 parts could not be had: errors.txt in it says why\n") {
		t.Errorf("without an agent: %+v", got)
	}
	text := unpacked(t, "without-agent.tar.gz")["errors.txt"]
	for _, want := range []string{"flows.json: weir flows: ", "guard.json: weir guard: ", "changes.json: weir changes: ", "agent.log: read the agent's log by journalctl: not there\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("errors.txt has no %q:\n%s", want, text)
		}
	}
}

// debugOnAKernel makes an archive of a real node.
func debugOnAKernel(t *testing.T, archive string, paths store.Paths) {
	t.Helper()
	files := unpacked(t, archive)
	var status struct {
		Loaded bool
		Paths  store.Paths
	}
	if err := json.Unmarshal([]byte(files["status.json"]), &status); err != nil || !status.Loaded || status.Paths.PinDir != paths.PinDir {
		t.Errorf("status.json = %+v, %v: want that of %s", status, err, paths.PinDir)
	}
	if !strings.Contains(files["verdicts.json"], `"refused_no_proxy"`) || !strings.Contains(files["workloads.txt"], "demo") {
		t.Errorf("verdicts.json:\n%s\nworkloads.txt:\n%s", files["verdicts.json"], files["workloads.txt"])
	}
}
