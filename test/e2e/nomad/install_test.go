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
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// TestSystemJob puts Weir on a node that has none, by the job of deploy/ that Nomad
// itself runs on every client, and takes it off again.
func TestSystemJob(t *testing.T) {
	n := nomad.Start(t, nomad.Options{NoWeir: true})
	speaksHTTP(n, "install-front", "install-back")
	const attribute = "plugins.cni.version.consul-cni"
	if version := n.Attributes()[attribute]; version != "" {
		t.Fatalf("a node without Weir has %s %s", attribute, version)
	}
	system := n.Run("../../../deploy/weir.nomad.hcl", "artifact", serveArchive(t, n))
	if version := n.Attributes()[attribute]; version != "" {
		t.Errorf("Nomad sees the plugin, %s %s, before its client is restarted: deploy/weir.nomad.hcl says that it does not", attribute, version)
	}
	process := func() string { return n.Command("pgrep", "-f", "^/usr/local/bin/weir agent") }
	agent := process()
	n.Nomad.Restart(t)
	test.Eventually(t, func() error {
		if attributes := n.Attributes(); attributes[attribute] == "" {
			return fmt.Errorf("attributes are %v", attributes)
		}
		return nil
	}, "Nomad to see the plugin")
	if now := process(); now != agent {
		t.Errorf("the agent is process %s after the restart of Nomad's client, it was %s", now, agent)
	}

	job := n.Run("testdata/jobs/install.nomad.hcl")
	front, back := job.Alloc("front"), job.Alloc("back")
	meshed := func() {
		t.Helper()
		wantEachOther(t, front, back)
	}
	meshed()

	uninstall := func() error {
		_, err := n.Try("/usr/local/bin/weir", "uninstall")
		return err
	}
	refused := func(want ...string) {
		t.Helper()
		err := uninstall()
		if err == nil {
			t.Fatalf("weir uninstall did not refuse; want %q", want)
		}
		for _, text := range want {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("weir uninstall refuses with %q, want %q in it", err, text)
			}
		}
	}
	refused("the agent runs", "nomad job stop weir")
	system.Stop()
	refused(front.ID+" (job install, group front)", back.ID+" (job install, group back)", "With -force they run on", "nomad node drain")
	meshed() // without the agent, and after what was refused
	if got := front.Get("front", "http://"+back.Workload().Addresses[0]+":8080/"); answered(got, back) {
		t.Errorf("after the refusal an application is reached past its proxy: %s", got)
	}

	job.Stop()
	n.ExpectNothingLeft()
	if err := uninstall(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		"/opt/cni/bin/weir", "/opt/cni/bin/consul-cni", "/opt/cni/config/weir.conflist", "/opt/cni/config/weir-chained.conflist",
		"/usr/local/bin/weir", "/etc/weir.d", "/var/lib/weir", "/run/weir", "/sys/fs/bpf/weir",
	} {
		if _, err := os.Lstat(n.Path(name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("weir uninstall left %s (%v)", name, err)
		}
	}
	if links := n.Command("ip", "-brief", "link", "show", "type", "bridge"); strings.Contains(links, "weir") {
		t.Errorf("weir uninstall left a bridge: %s", links)
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
