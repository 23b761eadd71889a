// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
)

// strippable are allocations of each kind for which Weir does something: front is
// transparent on Nomad's bridge, back on the plugin's, guarded is a plain connect job
// with back as its upstream, plain only has its network from the plugin.
type strippable struct{ front, back, guarded, plain *nomad.Alloc }

// What "weir uninstall" says that -force takes, by whom it says that of.
const (
	ofTransparent = "a transparent one new connections of its tasks do not reach Envoy any more: virtual addresses and Consul's DNS stop answering, " +
		"all else goes past the mesh, and its ports take connections from outside without Envoy."
	ofGuarded = "one that is guarded alone virtual addresses of its upstreams stop answering, and its ports take connections from outside " +
		"that the guard counted or refused."
	ofNetwork = "one whose network Weir is called for Nomad can no longer check or end its network: it gives the allocation up as failed when its client starts again, in cni/* with tasks that run on, " +
		"and its address and host ports stay taken until Weir is installed again and weir gc frees them."
)

// refuse: without -force Weir stays, names each allocation and says what it would lose.
func (s strippable) refuse(t *testing.T, n *nomad.Node) {
	t.Helper()
	said := refused(t, n, "/usr/local/bin/weir", "uninstall")
	for _, want := range []string{
		"4 allocations run under Weir:",
		s.front.ID + " (job install, group front)", s.back.ID + " (job install, group back)",
		s.guarded.ID + " (job uninstall, group guarded)", s.plain.ID + " (job uninstall, group plain)",
		"With -force they run on, but of " + ofTransparent,
		"With -force they run on, but of " + ofGuarded,
		"With -force they run on, but of " + ofNetwork,
		"nomad node drain",
	} {
		if !strings.Contains(said, want) {
			t.Errorf("weir uninstall refuses with %q, want %q in it", said, want)
		}
	}
}

// strip takes Weir off under the allocations, and looks at all that it said.
func (s strippable) strip(t *testing.T, n *nomad.Node) {
	t.Helper()
	address := make(map[*nomad.Alloc]string)
	for _, a := range []*nomad.Alloc{s.front, s.back, s.guarded} {
		address[a] = "http://" + a.Workload().Addresses[0] + ":8080/"
	}
	virtual := make(map[*nomad.Alloc]string)
	for asker, a := range map[*nomad.Alloc]*nomad.Alloc{s.front: s.back, s.back: s.front} {
		got := asker.App(asker.Group, "lookup", "install-"+a.Group+".virtual.consul")
		if len(got.Addresses) != 1 {
			t.Fatalf("look up %s: %s", a.Group, got)
		}
		virtual[a] = "http://" + got.Addresses[0] + "/"
	}
	const outside, upstream = "http://" + nomad.NeighbourAddress + "/", "http://127.0.0.1:9191/"
	const mapped = "http://" + nomad.NodeAddress + ":28090/"
	stays := func() {
		t.Helper()
		wantMesh(t, s.guarded.EventuallyGet("guarded", upstream, nil), s.back, "uninstall-guarded") // from Envoy to Envoy
		wantReply(t, n.Get(n.Neighbour(), mapped), s.plain)
		if got := s.plain.Get("plain", outside); got.Reply == nil {
			t.Errorf("a plain allocation asks a neighbour of the node: %s, want an answer", got)
		}
	}

	stays()
	wantMesh(t, s.guarded.EventuallyGet("guarded", virtual[s.back], nil), s.back, "uninstall-guarded")
	for _, a := range []*nomad.Alloc{s.front, s.back} {
		if got := a.Get(a.Group, outside); got.Reply != nil {
			t.Errorf("%s leaves the mesh before the uninstallation: %s", a.Group, got)
		}
	}
	for a, url := range address {
		if got := n.Get(n.NetNS(), url); answered(got, a) {
			t.Errorf("%s is reached before the uninstallation: %s", a.Group, got)
		}
	}
	if got := n.Get(n.NetNS(), address[s.guarded]); got.Errno != syscall.ECONNREFUSED {
		t.Errorf("the guard of a plain job lets the node in: %s", got)
	}

	n.Command("/usr/local/bin/weir", "uninstall", "-force")
	wantStandIn(t, n)

	stays()
	for asker, a := range map[*nomad.Alloc]*nomad.Alloc{s.front: s.back, s.back: s.front, s.guarded: s.back} {
		if got := asker.Get(asker.Group, virtual[a]); got.Reply != nil {
			t.Errorf("%s asks a virtual address: %s, want no answer: it was said to stop", asker.Group, got)
		}
	}
	for _, a := range []*nomad.Alloc{s.front, s.back} {
		if got := a.App(a.Group, "lookup", "install-back.virtual.consul"); got.Error == "" {
			t.Errorf("%s has Consul's DNS: %s, which was said to stop", a.Group, got)
		}
		if got := a.Get(a.Group, outside); got.Reply == nil || got.Reply.Task != "neighbour" {
			t.Errorf("%s asks a neighbour of the node: %s, want it to go past the mesh, as was said", a.Group, got)
		}
	}
	for a, url := range address {
		if got := n.Get(n.NetNS(), url); !answered(got, a) {
			t.Errorf("the node asks the application of %s: %s, want it to answer without Envoy, as was said", a.Group, got)
		}
	}
}

// nomadCannotEnd restarts Nomad's client: it gives up those of whose network Weir was
// part, whose tasks run on, and whose addresses and host ports stay taken. Consul's
// plugin, which is back, sees to the others.
func (s strippable) nomadCannotEnd(t *testing.T, n *nomad.Node) {
	t.Helper()
	n.Nomad.Restart(t)
	for _, a := range []*nomad.Alloc{s.back, s.plain} {
		test.Eventually(t, func() error {
			var told struct{ ClientStatus string }
			if n.NomadGet("/v1/allocation/"+a.ID, &told); told.ClientStatus != "failed" {
				return fmt.Errorf("it is %s", told.ClientStatus)
			}
			return nil
		}, "Nomad to fail allocation "+a.Group)
	}
	for _, a := range []*nomad.Alloc{s.front, s.guarded} {
		var told struct{ ClientStatus string }
		if n.NomadGet("/v1/allocation/"+a.ID, &told); told.ClientStatus != "running" {
			t.Errorf("%s is %s after the restart of Nomad's client, want it to run", a.Group, told.ClientStatus)
		}
	}
	wantReply(t, n.Get(n.Neighbour(), "http://"+nomad.NodeAddress+":28090/"), s.plain)
	for _, a := range []*nomad.Alloc{s.back, s.plain} {
		containers := strings.Fields(n.Command("docker", "ps", "--all", "--quiet", "--filter", "name="+a.ID))
		if len(containers) < 2 {
			t.Errorf("%s has containers %q, want its tasks to run on, as was said", a.Group, containers)
		}
		n.Command("docker", append([]string{"rm", "--force"}, containers...)...)
	}
	for _, a := range []*nomad.Alloc{s.back, s.plain} {
		held := false
		leases, err := filepath.Glob(n.Path("/run/weir/leases/weir/*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range leases {
			text, err := os.ReadFile(file)
			held = held || err == nil && strings.Contains(string(text), a.ID)
		}
		if !held {
			t.Errorf("no lease holds the address of %s: %q, want it to stay taken, as was said", a.Group, leases)
		}
	}
	if rules := n.Command("nft", "list", "ruleset"); !strings.Contains(rules, s.plain.ID) {
		t.Errorf("host ports are %s, want that of %s to stay taken, as was said", rules, s.plain.ID)
	}
}
