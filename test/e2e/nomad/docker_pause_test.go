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
// container of its own, in both modes. Where that restarts there is another namespace
// under the same ID, an empty one. The tasks stay where they are, and stay in the mesh.
func TestDockerRestartsNamespace(t *testing.T) {
	n := nomad.Start(t, nomad.Options{})
	serveNeighbour(t, n, ":80")
	n.ConfigEntry(map[string]any{"Kind": "mesh", "TransparentProxy": map[string]any{"MeshDestinationsOnly": true}})
	meshes := []*mesh{
		runMesh(n, "testdata/jobs/life-docker.nomad.hcl", "pauseb", "bridge"),
		runMesh(n, "testdata/jobs/life-docker.nomad.hcl", "pausec", "cni/weir"),
	}
	for _, m := range meshes {
		m.wantWorks(t)
	}
	for _, each := range []struct {
		name string
		test func(*testing.T, *nomad.Node, []*mesh)
	}{
		{"WhileNomadRuns", pauseWhileNomadRuns},
		{"WhileNomadIsDown", pauseWhileNomadIsDown},
	} {
		t.Run(each.name, func(t *testing.T) {
			n := n.For(t)
			each.test(t, n, allOn(n, meshes))
		})
	}
	for _, m := range meshes {
		m.job.Stop()
	}
	// The namespaces that the tasks stayed in have no record. When they have ended, the
	// agent takes their programs away within two minutes, or when it starts.
	test.Eventually(t, func() error {
		_, err := n.Try("weir", "status")
		return err
	}, "the tasks' namespaces to end")
	n.Agent.Restart(t)
	wantOnly(t, n)
}

// restartNamespaces makes Docker restart the containers that hold them.
func restartNamespaces(n *nomad.Node, meshes []*mesh) {
	for _, a := range everyAlloc(meshes) {
		n.Command("docker", "restart", "-t", "0", "nomad_init_"+a.ID)
	}
}

// settled is a mesh, where its client's tasks are, and the address that its server
// has from the start.
type settled struct {
	*mesh
	netns   uint64
	address string
}

func settle(t *testing.T, n *nomad.Node, meshes []*mesh) (list []settled) {
	t.Helper()
	for _, m := range meshes {
		var told struct{ NetworkStatus struct{ Address string } }
		n.NomadGet("/v1/allocation/"+m.server.ID, &told)
		list = append(list, settled{m, inode(t, m.client.NetNS("client")), told.NetworkStatus.Address})
	}
	return list
}

// wantInMeshStill wants tasks to be in their namespace, redirected, and reached by
// their proxy alone.
func wantInMeshStill(t *testing.T, n *nomad.Node, meshes []settled) {
	t.Helper()
	for _, m := range meshes {
		if now := inode(t, m.client.NetNS("client")); now != m.netns {
			t.Errorf("%s: the client's tasks were in namespace %d, are in %d", m.id, m.netns, now)
		}
		for range 5 {
			if got := m.client.Get("client", m.url); !m.inMesh(got) {
				t.Errorf("%s: the client is answered with %s, want the mesh", m.id, got)
			}
		}
		if got := m.client.Get("client", "http://"+nomad.NeighbourAddress+"/"); got.Reply != nil {
			t.Errorf("%s: the client got out past its proxy: %s", m.id, got)
		}
		wantProxyAlone(t, n, m)
	}
}

// wantProxyAlone fails where the node reaches the server itself.
func wantProxyAlone(t *testing.T, n *nomad.Node, m settled) {
	t.Helper()
	if got := n.Get(n.NetNS(), "http://"+m.address+":8080/"); got.Reply != nil {
		t.Errorf("%s: the server was reached past its proxy: %s", m.id, got)
	}
}

func pauseWhileNomadRuns(t *testing.T, n *nomad.Node, meshes []*mesh) {
	before := settle(t, n, meshes)
	cookies := make(map[string]string)
	for _, a := range everyAlloc(meshes) {
		cookies[a.ID] = a.Workload().Cookie
	}
	restartNamespaces(n, meshes)
	wantInMeshStill(t, n, before)
	for _, a := range everyAlloc(meshes) {
		a.EventuallyWorkload("the new namespace to be guarded too", func(w nomad.Workload) bool {
			return w.Cookie != cookies[a.ID] && w.Mode == "transparent" && len(w.Addresses) == 0
		})
	}
	wantInMeshStill(t, n, before)
}

// pauseWhileNomadIsDown: when Nomad is back, CHECK fails in the empty namespace, Nomad
// makes another, and ADD is refused there: by the reference plugin since it knows the
// allocation, by Weir's since tasks run in the old one. Nomad fails it and places
// another one.
func pauseWhileNomadIsDown(t *testing.T, n *nomad.Node, meshes []*mesh) {
	before := settle(t, n, meshes)
	var old []string
	for _, a := range everyAlloc(meshes) {
		old = append(old, a.ID)
	}
	n.Nomad.Stop(t)
	restartNamespaces(n, meshes)
	wantInMeshStill(t, n, before)
	n.Nomad.Start(t)
	var replaced []*nomad.Alloc
	test.EventuallyIn(t, inLine, func() error {
		replaced = nil
		for _, m := range before {
			wantProxyAlone(t, n, m)
			for _, a := range m.job.Allocs() {
				if a.ClientStatus == "running" && !slices.Contains(old, a.ID) {
					replaced = append(replaced, a)
				}
			}
		}
		if len(replaced) < len(old) {
			return fmt.Errorf("%d allocations are replaced, want %d", len(replaced), len(old))
		}
		return nil
	}, "other allocations")
	want := make(map[string]bool)
	for _, m := range meshes {
		m.job.Await()
		for _, a := range replaced {
			switch {
			case a.JobID != m.id:
			case a.Group == "client":
				m.client = a
			default:
				m.server = a
			}
		}
		m.wantWorks(t)
		want[m.client.ID], want[m.server.ID] = true, true
	}
	test.Eventually(t, func() error {
		return errors.Join(
			onlyThese("results", files(n, "/var/lib/cni/results/*"), want),
			onlyThese("records", files(n, "/run/weir/workloads/*.json"), want),
			onlyThese("leases", leases(n), want))
	}, "nothing of the old allocations to be left")
}
