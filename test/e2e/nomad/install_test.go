// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// standIn is in the place of Consul's plugin: one that does nothing.
const standIn = "#!/bin/sh\n[ \"$CNI_COMMAND\" ] || echo 'CNI plugin consul-cni v1.5.0'\n"

// TestSystemJob puts Weir on a node that has none, by the job of deploy/ that Nomad
// itself runs on every client, upgrades it, and takes it off again.
func TestSystemJob(t *testing.T) {
	n := nomad.Start(t, nomad.Options{NoWeir: true})
	meshAlone(n)
	serveNeighbour(t, n, ":80")
	speaksHTTP(n, "install-front", "install-back", "uninstall-guarded")
	const attribute = "plugins.cni.version.consul-cni"
	if version := n.Attributes()[attribute]; version != "" {
		t.Fatalf("a node without Weir has %s %s", attribute, version)
	}
	const file = "../../../deploy/weir.nomad.hcl"
	artifact := serveArchive(t, n)
	n.Write("/opt/cni/bin/consul-cni", standIn, 0o755)
	systemJobRefuses(t, n, n.Submit(file, "artifact", artifact))
	system := n.Run(file, "artifact", artifact, "replace", "true")
	if version := n.Attributes()[attribute]; version != "" {
		t.Errorf("Nomad sees the plugin, %s %s, before its client is restarted: deploy/weir.nomad.hcl says that it does not", attribute, version)
	}
	agent := agentProcess(t, n)
	n.Nomad.Restart(t)
	test.Eventually(t, func() error {
		if attributes := n.Attributes(); attributes[attribute] == "" {
			return fmt.Errorf("attributes are %v", attributes)
		}
		return nil
	}, "Nomad to see the plugin")
	if now := agentProcess(t, n); now != agent {
		t.Errorf("the agent is process %s after the restart of Nomad's client, it was %s", now, agent)
	}

	job := n.Run("testdata/jobs/install.nomad.hcl")
	front, back := job.Alloc("front"), job.Alloc("back")
	meshed := func() {
		t.Helper()
		wantEachOther(t, front, back)
	}
	meshed()
	upgrade(t, n, front, back)
	more := n.Run("testdata/jobs/uninstall.nomad.hcl")
	four := strippable{front: front, back: back, guarded: more.Alloc("guarded"), plain: more.Alloc("plain")}
	wantWorkload(four.guarded, "direct", "enforce") // as agent_args of the upgrade has it

	said := refused(t, n, "/usr/local/bin/weir", "uninstall")
	for _, want := range []string{"the agent runs", "nomad job stop weir"} {
		if !strings.Contains(said, want) {
			t.Errorf("weir uninstall refuses with %q, want %q in it", said, want)
		}
	}
	system.Stop()
	four.refuse(t, n)
	meshed() // without the agent, and after what was refused
	if got := front.Get("front", "http://"+back.Workload().Addresses[0]+":8080/"); answered(got, back) {
		t.Errorf("after the refusal an application is reached past its proxy: %s", got)
	}
	four.strip(t, n)
	four.nomadCannotEnd(t, n)

	for _, each := range []*nomad.Job{job, more} {
		each.End()
	}
	// The remedy that was named.
	n.Command("/opt/tools/of-weir/weir", "install", "-unit-dir", "", "-replace")
	n.Command("weir", "gc")
	test.Eventually(t, func() error {
		return errors.Join(
			onlyThese("results", files(n, "/var/lib/cni/results/*"), nil),
			onlyThese("records", files(n, "/run/weir/*/*.json"), nil),
			onlyThese("leases", leases(n), nil))
	}, "no network to be left")
	if rules := n.Command("nft", "list", "ruleset"); strings.Contains(rules, four.plain.ID) || strings.Contains(rules, "table inet weir") {
		t.Errorf("rules are left: %s", rules)
	}
	n.Command("weir", "uninstall")
	for _, name := range []string{
		"/opt/cni/bin/weir", "/opt/cni/config/weir.conflist", "/opt/cni/config/weir-chained.conflist",
		"/usr/local/bin/weir", "/etc/weir.d", "/var/lib/weir", "/run/weir", "/sys/fs/bpf/weir",
	} {
		if _, err := os.Lstat(n.Path(name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("weir uninstall left %s (%v)", name, err)
		}
	}
	wantStandIn(t, n)
	if links := n.Command("ip", "-brief", "link", "show", "type", "bridge"); strings.Contains(links, "weir") {
		t.Errorf("weir uninstall left a bridge: %s", links)
	}
}

func wantStandIn(t *testing.T, n *nomad.Node) {
	t.Helper()
	if text, err := os.ReadFile(n.Path("/opt/cni/bin/consul-cni")); err != nil || string(text) != standIn {
		t.Errorf("consul-cni is not what was there before Weir: %d bytes, %v", len(text), err)
	}
}

// agentProcess is the agent that Nomad runs, by its one process. It may take the place
// of another.
func agentProcess(t *testing.T, n *nomad.Node, but ...string) (pid string) {
	t.Helper()
	test.EventuallyIn(t, time.Minute, func() error {
		out, err := n.Try("pgrep", "-f", "^/usr/local/bin/weir agent")
		if pid = strings.TrimSpace(out); err != nil || strings.Contains(pid, "\n") || slices.Contains(but, pid) {
			return fmt.Errorf("processes are %q, %w", out, err)
		}
		exe, err := n.Try("readlink", "/proc/"+pid+"/exe")
		if err != nil || strings.TrimSpace(exe) != "/usr/local/bin/weir" {
			return fmt.Errorf("process %s is of %q, %w", pid, exe, err)
		}
		return nil
	}, "one process of the agent")
	return pid
}

// systemJobRefuses: somebody else's consul-cni stays, and the task says what to do.
func systemJobRefuses(t *testing.T, n *nomad.Node, job *nomad.Job) {
	t.Helper()
	const want = "install /opt/cni/bin/consul-cni: another program's file is in the way: -replace keeps it as consul-cni.weir-saved"
	test.Eventually(t, func() error {
		list := job.Allocs()
		if len(list) != 1 {
			return fmt.Errorf("%d allocations", len(list))
		}
		told, err := os.ReadFile(list[0].File("alloc/logs/install.stderr.0"))
		if err != nil || !strings.Contains(string(told), want) {
			return fmt.Errorf("the task says %q, %w", told, err)
		}
		if events := list[0].Events(); !strings.Contains(events, "Exit Code: 1") {
			return fmt.Errorf("events are %q", events)
		}
		return nil
	}, "the task to fail and say why")
	wantStandIn(t, n)
	if out, err := n.Try("pgrep", "-f", "weir agent"); err == nil {
		t.Errorf("an agent runs on a node that was refused: %s", out)
	}
}

// upgrade runs the job again with another version and other arguments: each request
// that two allocations make meanwhile is answered.
func upgrade(t *testing.T, n *nomad.Node, front, back *nomad.Alloc) {
	t.Helper()
	const version, dir = "v77.7.7-upgrade", "/opt/weir/next"
	built := nomad.BuildVersion(t, version)
	for _, name := range []string{"weir", "weir-cni"} {
		program, err := os.ReadFile(filepath.Join(built, name))
		if err != nil {
			t.Fatal(err)
		}
		n.Write(filepath.Join(dir, name), string(program), 0o755)
	}
	agent := agentProcess(t, n)
	loops := map[*nomad.Alloc]*nomad.Loop{
		back:  front.Loop("front", "http://install-back.virtual.consul/"),
		front: back.Loop("back", "http://install-front.virtual.consul/"),
	}
	inMesh := func(a *nomad.Alloc) func(wire.Outcome) bool {
		return func(got wire.Outcome) bool {
			return got.Reply != nil && got.Reply.Alloc == a.ID && strings.HasPrefix(got.Reply.Remote, "127.0.0.1:")
		}
	}
	for a, loop := range loops {
		loop.Await(5, "answered before the upgrade", inMesh(a))
	}
	n.Run("../../../deploy/weir.nomad.hcl", "weir_dir", dir, "agent_args", `["-guard", "enforce"]`, "agent_env", `{ CONSUL_HTTP_ADDR = "http://127.0.0.1:8500" }`)
	now := agentProcess(t, n, agent)
	if env := n.Command("cat", "/proc/"+now+"/environ"); !strings.Contains(env, "CONSUL_HTTP_ADDR=http://127.0.0.1:8500\x00") {
		t.Errorf("the agent's environment is %q, want what agent_env says", env)
	}
	for _, program := range []string{"/usr/local/bin/weir", "/opt/cni/bin/weir", "/opt/cni/bin/consul-cni"} {
		var args []string
		if program == "/usr/local/bin/weir" {
			args = []string{"version"}
		}
		if said := n.Command(program, args...); !strings.Contains(said, version) {
			t.Errorf("%s is %q, want version %s", program, said, version)
		}
	}
	for a, loop := range loops {
		loop.Await(10, "answered after the upgrade", inMesh(a))
		list := loop.Stop()
		for _, got := range list {
			if !inMesh(a)(got) {
				t.Errorf("lost by the upgrade: %s", got)
			}
		}
		t.Logf("%d requests while it was upgraded", len(list))
	}
}

// wantEachOther has the two groups of install.nomad.hcl ask each other.
func wantEachOther(t *testing.T, front, back *nomad.Alloc) {
	t.Helper()
	const path = ".virtual.consul/"
	wantMesh(t, front.EventuallyGet("front", "http://install-back"+path, nil), back, "install-front")
	wantMesh(t, back.EventuallyGet("back", "http://install-front"+path, nil), front, "install-back")
}

// cniWeirChained runs the conflist of deploy/ with the reference plugins.
func cniWeirChained(t *testing.T, n *nomad.Node) {
	meshAlone(n)
	serveNeighbour(t, n, ":80")
	speaksHTTP(n, "install-front", "install-back")
	job := n.Run("testdata/jobs/install.nomad.hcl", "network", "cni/weir-chained")
	front, back := job.Alloc("front"), job.Alloc("back")
	wantEachOther(t, front, back)
	if addresses := back.Workload().Addresses; len(addresses) == 0 || !netip.MustParsePrefix("172.26.112.0/20").Contains(netip.MustParseAddr(addresses[0])) {
		t.Errorf("addresses are %q, want one of 172.26.112.0/20", addresses)
	}
	var got wire.Outcome
	grown := counted(back, func() { got = back.Get("back", "http://"+nomad.NeighbourAddress+"/") })
	if got.Reply != nil || grown["redirected"] != 1 {
		t.Errorf("it dials past the mesh: %s, verdicts %v", got, grown)
	}
	wantWorkload(back, "transparent", "audit")
}

// serveArchive offers Weir's programs as the system job fetches them, from a
// neighbour of the node, until the test ends.
func serveArchive(t *testing.T, n *nomad.Node) (url string) {
	var packed bytes.Buffer
	digest := sha256.New()
	compressed := gzip.NewWriter(io.MultiWriter(&packed, digest))
	archive := tar.NewWriter(compressed)
	for _, name := range []string{"weir", "weir-cni"} {
		program, err := os.ReadFile(n.Path("/opt/tools/of-weir/" + name))
		if err == nil {
			err = archive.WriteHeader(&tar.Header{Name: "weir/" + name, Mode: 0o755, Size: int64(len(program))})
		}
		if err == nil {
			_, err = archive.Write(program)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(archive.Close(), compressed.Close()); err != nil {
		t.Fatal(err)
	}
	var listener net.Listener
	var err error
	n.Neighbour().Do(func() { listener, err = net.Listen("tcp", nomad.NeighbourAddress+":8000") })
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "weir.tar.gz", time.Time{}, bytes.NewReader(packed.Bytes()))
	})}
	go func() { _ = server.Serve(listener) }() // until it is closed
	t.Cleanup(func() { server.Close() })
	return fmt.Sprintf("http://%s/weir.tar.gz?checksum=sha256:%x", listener.Addr(), digest.Sum(nil))
}

// answered tells that an application answered without its proxy.
func answered(got wire.Outcome, a *nomad.Alloc) bool {
	return got.Reply != nil && got.Reply.Alloc == a.ID && !strings.HasPrefix(got.Reply.Remote, "127.0.0.1:")
}
