// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"errors"
	"testing"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
)

// TestReboot: of all that a machine forgets nothing is missing afterwards, and nothing
// old is left on the disk.
func TestReboot(t *testing.T) {
	node := nomad.Start(t, nomad.Options{})
	// What is made at a boot ends with the test that boots: after the jobs.
	t.Run("BothModes", func(t *testing.T) { reboot(t, node) })
}

func reboot(t *testing.T, node *nomad.Node) {
	n := node.For(t)
	n.ConfigEntry(map[string]any{"Kind": "mesh", "TransparentProxy": map[string]any{"MeshDestinationsOnly": true}})
	meshes := []*mesh{
		runMesh(n, "testdata/jobs/life-docker.nomad.hcl", "bootb", "bridge"),
		runMesh(n, "testdata/jobs/life-docker.nomad.hcl", "bootc", "cni/weir"),
	}
	exec := runMesh(n, "testdata/jobs/life-mesh.nomad.hcl", "boote", "cni/weir")
	want := make(map[string]bool)
	for _, m := range append(meshes, exec) {
		m.wantWorks(t)
		want[m.client.ID], want[m.server.ID] = true, true
	}
	node.Reboot()
	for _, m := range append(meshes, exec) {
		awaitStarts(t, n, m.client, 2)
		awaitStarts(t, n, m.server, 2)
	}
	for _, m := range meshes {
		m.job.Await()
		m.refresh()
		if !want[m.client.ID] || !want[m.server.ID] {
			t.Errorf("%s: allocations are %s and %s, want those of before", m.id, m.client.ID, m.server.ID)
		}
		for _, a := range []*nomad.Alloc{m.server, m.client} {
			a.EventuallyWorkload("a workload without problems, with its proxy", func(w nomad.Workload) bool {
				return w.Mode == "transparent" && w.Proxy.Identity == "cgroup" && w.Proxy.Listeners == 2 &&
					len(w.Problems) == 0 && w.Agent != nil && len(w.Agent.Problems) == 0
			})
		}
		m.wantWorks(t)
	}
	t.Run("Exec", func(t *testing.T) { replaceExec(t, n.For(t), exec, want) })
	test.Eventually(t, func() error {
		return errors.Join(
			onlyThese("results", files(n, "/var/lib/cni/results/*"), want),
			onlyThese("records", files(n, "/run/weir/workloads/*.json"), want),
			onlyThese("leases", leases(n), want))
	}, "nothing from before the reboot to be left")
}

// replaceExec: a task of the exec driver that outlives a reboot comes back without its
// shared directory, and so Envoy without Consul's socket, since Nomad 1.11 mounts that
// only once. The allocation is redirected all the same, to a proxy that does not
// listen; when it is stopped, the one in its place works.
func replaceExec(t *testing.T, n *nomad.Node, m *mesh, want map[string]bool) {
	serveNeighbour(t, n, ":80")
	m = m.on(n)
	old := []*nomad.Alloc{m.client, m.server}
	for _, a := range old {
		a.EventuallyWorkload("a transparent workload", func(w nomad.Workload) bool { return w.Mode == "transparent" })
	}
	for _, url := range []string{m.url, "http://" + nomad.NeighbourAddress + "/"} {
		if got := m.client.Get("client", url); got.Reply != nil {
			t.Errorf("GET %s past a proxy without Consul: %s", url, got)
		}
	}
	stopAllocs(t, n, []*mesh{m})
	for _, a := range old {
		delete(want, a.ID)
	}
	want[m.client.ID], want[m.server.ID] = true, true
}
