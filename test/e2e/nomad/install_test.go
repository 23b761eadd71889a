// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// TestSystemJob puts Weir on a node that has none, by the job of deploy/ that Nomad
// itself runs on every client, and takes it off again.
func TestSystemJob(t *testing.T) {
	n := nomad.Start(t, nomad.Options{NoWeir: true})
	const attribute = "plugins.cni.version.consul-cni"
	if version := n.Attributes()[attribute]; version != "" {
		t.Fatalf("a node without Weir has %s %s", attribute, version)
	}
	system := n.Run("../../../deploy/weir.nomad.hcl", "weir_dir", "/opt/tools/of-weir")
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

	speaksHTTP(n, "install-front", "install-back")
	job := n.Run("testdata/jobs/install.nomad.hcl")
	front, back := job.Alloc("front"), job.Alloc("back")
	meshed := func() {
		t.Helper()
		const path = ".virtual.consul/"
		wantMesh(t, front.EventuallyGet("front", "http://install-back"+path, nil), back, "install-front")
		wantMesh(t, back.EventuallyGet("back", "http://install-front"+path, nil), front, "install-back")
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

// answered tells that an application answered without its proxy.
func answered(got wire.Outcome, a *nomad.Alloc) bool {
	return got.Reply != nil && got.Reply.Alloc == a.ID && !strings.HasPrefix(got.Reply.Remote, "127.0.0.1:")
}
