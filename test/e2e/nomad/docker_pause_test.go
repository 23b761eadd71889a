// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
)

// TestDockerRestartsNamespace: the namespace of an allocation of Docker's belongs to a
// container of its own. Where that restarts there is another namespace under the same
// ID, an empty one. The tasks stay where they are, and stay in the mesh.
func TestDockerRestartsNamespace(t *testing.T) {
	n := nomad.Start(t, nomad.Options{})
	serveNeighbour(t, n, ":80")
	n.ConfigEntry(map[string]any{"Kind": "mesh", "TransparentProxy": map[string]any{"MeshDestinationsOnly": true}})
	m := runMesh(n, "testdata/jobs/life-docker.nomad.hcl", "pause", "bridge")
	m.wantWorks(t)
	address := m.server.Workload().Addresses[0]

	// inMeshStill wants the tasks in their namespace, redirected, and reached by
	// their proxy alone.
	inMeshStill := func(t *testing.T, n *nomad.Node, m *mesh, netns uint64) {
		t.Helper()
		if now := inode(t, m.client.NetNS("client")); now != netns {
			t.Errorf("the client's tasks were in namespace %d, are in %d", netns, now)
		}
		for range 5 {
			if got := m.client.Get("client", m.url); !m.inMesh(got) {
				t.Errorf("the client is answered with %s, want the mesh", got)
			}
		}
		if got := m.client.Get("client", "http://"+nomad.NeighbourAddress+"/"); got.Reply != nil {
			t.Errorf("the client got out past its proxy: %s", got)
		}
		if got := n.Get(n.NetNS(), "http://"+address+":8080/"); got.Reply != nil {
			t.Errorf("the server was reached past its proxy: %s", got)
		}
	}
	restart := func(n *nomad.Node, m *mesh) {
		for _, a := range []*nomad.Alloc{m.client, m.server} {
			n.Command("docker", "restart", "-t", "0", "nomad_init_"+a.ID)
		}
	}

	t.Run("WhileNomadRuns", func(t *testing.T) {
		n := n.For(t)
		m := m.on(n)
		netns, cookie := inode(t, m.client.NetNS("client")), m.client.Workload().Cookie
		restart(n, m)
		inMeshStill(t, n, m, netns)
		for _, a := range []*nomad.Alloc{m.client, m.server} {
			a.EventuallyWorkload("the new namespace to be guarded too", func(w nomad.Workload) bool {
				return w.Cookie != cookie && w.Mode == "transparent" && len(w.Addresses) == 0
			})
		}
		inMeshStill(t, n, m, netns)
	})

	t.Run("WhileNomadIsDown", func(t *testing.T) {
		n := n.For(t)
		m := m.on(n)
		netns := inode(t, m.client.NetNS("client"))
		n.Nomad.Stop(t)
		restart(n, m)
		inMeshStill(t, n, m, netns)
		n.Nomad.Start(t)
		// CHECK fails in the empty namespace, and the reference plugin refuses to add an
		// allocation that it knows: Nomad fails it and places another one.
		old := []string{m.client.ID, m.server.ID}
		test.Eventually(t, func() error {
			replaced := 0
			for _, a := range m.job.Allocs() {
				if a.ClientStatus == "running" && !slices.Contains(old, a.ID) {
					replaced++
				}
			}
			if got := n.Get(n.NetNS(), "http://"+address+":8080/"); got.Reply != nil {
				t.Fatalf("the server was reached past its proxy: %s", got)
			}
			if replaced < len(old) {
				return fmt.Errorf("%d allocations are replaced", replaced)
			}
			return nil
		}, "other allocations")
		m.job.Await()
		for _, a := range m.job.Allocs() {
			switch {
			case slices.Contains(old, a.ID):
			case a.Group == "client":
				m.client = a
			case a.Group == "server":
				m.server = a
			}
		}
		m.wantWorks(t)
		want := map[string]bool{m.client.ID: true, m.server.ID: true}
		test.Eventually(t, func() error {
			return errors.Join(
				onlyThese("results", files(n, "/var/lib/cni/results/*"), want),
				onlyThese("records", files(n, "/run/weir/workloads/*.json"), want),
				onlyThese("leases", leases(n), want))
		}, "nothing of the old allocations to be left")
	})
}
