// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// TestLifeCycle: whatever Nomad does with allocations, in both modes and of both
// drivers, leaves a mesh that works and nothing of those that went. Docker has its own
// rules on the node, which drop what the node forwards.
func TestLifeCycle(t *testing.T) {
	node := nomad.Start(t, nomad.Options{DockerRules: true})
	t.Run("Mesh", func(t *testing.T) { lifeCycle(t, node.For(t)) })
	if !t.Failed() {
		node.ExpectNothingLeft()
	}
}

func lifeCycle(t *testing.T, n *nomad.Node) {
	if rules := n.Command("iptables", "-S", "FORWARD"); !strings.Contains(rules, "-P FORWARD DROP") {
		t.Errorf("Docker has not set FORWARD to DROP:\n%s", rules)
	}
	meshes := []*mesh{
		runMesh(n, "testdata/jobs/life-docker.nomad.hcl", "lifeb", "bridge"),
		runMesh(n, "testdata/jobs/life-mesh.nomad.hcl", "lifec", "cni/weir"),
		runMesh(n, "testdata/jobs/life-docker.nomad.hcl", "lifed", "cni/weir"),
	}
	for _, each := range []struct {
		name string
		test func(*testing.T, *nomad.Node, []*mesh)
	}{
		{"NomadRestarts", nomadRestarts},
		{"DamageWhileNomadIsDown", damageWhileNomadIsDown},
		{"TasksRestart", tasksRestart},
		{"Stop", stopAlloc},
		{"Reschedule", reschedule},
	} {
		t.Run(each.name, func(t *testing.T) {
			n := n.For(t)
			each.test(t, n, allOn(n, meshes))
		})
	}
}

// nomadRestarts: a client that was stopped, or killed, comes back, checks what it finds
// and leaves all as it is; meanwhile no request is lost. It is stopped before it is
// killed: Nomad writes the address of an allocation to its disk in order of its end
// or once a minute, and fails an allocation whose address it finds nowhere.
func nomadRestarts(t *testing.T, n *nomad.Node, meshes []*mesh) {
	for _, end := range []struct {
		name string
		by   func(*nomad.Daemon, testing.TB)
	}{{"Stop", (*nomad.Daemon).Stop}, {"Kill", (*nomad.Daemon).Kill}} {
		t.Run(end.name, func(t *testing.T) {
			n := n.For(t)
			meshes := allOn(n, meshes)
			var before [][]life
			var loops []*nomad.Loop
			for _, m := range meshes {
				m.wantWorks(t)
				before = append(before, m.lives(t))
				loops = append(loops, m.client.Loop("client", m.url))
			}
			end.by(n.Nomad, t)
			for i, m := range meshes {
				loops[i].Await(20, "answered without Nomad", m.inMesh)
			}
			n.Nomad.Start(t)
			for i, m := range meshes {
				loops[i].Await(20, "answered after Nomad's start", m.inMesh)
				m.wantNothingLost(t, m.id, loops[i].Stop())
				m.wantSameLives(t, before[i])
				m.wantWorks(t)
			}
		})
	}
}

// damageWhileNomadIsDown: all of Weir's in the kernel goes while neither Nomad nor the
// agent runs, the records of one job too, and pieces of the network that the plugin
// built for others. Nomad's CHECK brings it back, and the allocations live on.
func damageWhileNomadIsDown(t *testing.T, n *nomad.Node, meshes []*mesh) {
	var before [][]life
	for _, m := range meshes {
		before = append(before, m.lives(t))
	}
	n.Agent.Stop(t)
	n.Nomad.Kill(t)
	if err := os.RemoveAll(n.Path("/sys/fs/bpf/weir")); err != nil {
		t.Fatal(err)
	}
	for _, a := range []*nomad.Alloc{meshes[0].client, meshes[0].server} {
		if err := os.Remove(n.Path("/run/weir/workloads/" + a.ID + "-eth0.json")); err != nil {
			t.Fatal(err)
		}
	}
	n.Command("nft", "delete", "table", "inet", "weir")
	n.Command("ip", "address", "flush", "dev", "weir")
	for _, m := range meshes[1:] {
		inside(t, m.client, "client", "ip", "address", "flush", "dev", "eth0")
		inside(t, m.server, "server", "ip", "route", "del", "default")
		if err := os.Remove(n.Path("/run/weir/networks/" + m.server.ID + "-eth0.json")); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(leaseOf(t, n, m.client)); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := n.Try("weir", "status"); err == nil {
		t.Fatalf("weir status is content although everything is gone: %s", out)
	}
	n.Nomad.Start(t)
	for i, m := range meshes {
		m.wantWorks(t)
		m.wantSameLives(t, before[i])
	}
	n.Agent.Start(t)
	for _, m := range meshes {
		for _, a := range []*nomad.Alloc{m.client, m.server} {
			a.EventuallyWorkload("a workload that is well again", func(w nomad.Workload) bool {
				return w.Mode == "transparent" && len(w.Problems) == 0 && w.Agent != nil && len(w.Agent.Problems) == 0
			})
		}
	}
}

// tasksRestart: "nomad alloc restart" gives new processes in the same namespace.
func tasksRestart(t *testing.T, n *nomad.Node, meshes []*mesh) {
	var before [][]life
	for _, m := range meshes {
		before = append(before, m.lives(t))
		for _, a := range []*nomad.Alloc{m.client, m.server} {
			n.Command("nomad", "alloc", "restart", "-all-tasks", a.ID)
		}
	}
	for i, m := range meshes {
		awaitStarts(t, n, m.client, 2)
		awaitStarts(t, n, m.server, 2)
		m.wantWorks(t)
		for j, after := range m.lives(t) {
			b := before[i][j]
			if b.ID != after.ID || b.NetNS != after.NetNS || b.Cookie != after.Cookie {
				t.Errorf("%s: allocation was %+v, is %+v, want the same namespace", m.id, b, after)
			}
			for task, pid := range after.PIDs {
				if pid == b.PIDs[task] {
					t.Errorf("%s: task %s is still process %d", m.id, task, pid)
				}
			}
		}
	}
}

// awaitStarts waits until all tasks of an allocation have been started so often and run.
func awaitStarts(t *testing.T, n *nomad.Node, a *nomad.Alloc, starts int) {
	t.Helper()
	test.Eventually(t, func() error {
		var told struct {
			TaskStates map[string]struct {
				State  string
				Events []struct{ Type string }
			}
		}
		n.NomadGet("/v1/allocation/"+a.ID, &told)
		for task, state := range told.TaskStates {
			seen := 0
			for _, event := range state.Events {
				if event.Type == "Started" {
					seen++
				}
			}
			if state.State != "running" || seen < starts {
				return fmt.Errorf("task %s is %s, was started %d times", task, state.State, seen)
			}
		}
		return nil
	}, fmt.Sprintf("%d starts of each task of %s", starts, a.Group))
}

// stopAlloc: "nomad alloc stop" ends an allocation for good, another takes its place.
func stopAlloc(t *testing.T, n *nomad.Node, meshes []*mesh) {
	stopAllocs(t, n, meshes)
	wantOnlyMeshes(t, n, meshes)
}

// stopAllocs stops the meshes' allocations, and waits until those in their place work.
func stopAllocs(t *testing.T, n *nomad.Node, meshes []*mesh) {
	t.Helper()
	for _, a := range everyAlloc(meshes) {
		n.Command("nomad", "alloc", "stop", "-detach", a.ID)
	}
	for _, m := range meshes {
		old := []string{m.client.ID, m.server.ID}
		test.Eventually(t, func() error {
			for _, a := range m.job.Allocs() {
				if slices.Contains(old, a.ID) {
					return fmt.Errorf("allocation %s is still wanted", a.ID)
				}
			}
			return nil
		}, "new allocations")
		m.job.Await()
		m.refresh()
		m.wantWorks(t)
	}
}

// reschedule: where a task dies that may not, Nomad places another allocation.
func reschedule(t *testing.T, n *nomad.Node, meshes []*mesh) {
	modes := map[string]string{"lifeb": "bridge", "lifec": "cni/weir"}
	all := meshes
	meshes = meshes[:len(modes)] // one in each mode asks
	jobs := make(map[*mesh]*nomad.Job)
	old := make(map[*mesh]*nomad.Alloc)
	for _, m := range meshes {
		id := m.id + "-f"
		speaksHTTP(n, id+"-fragile")
		jobs[m] = n.Run("testdata/jobs/life-fragile.nomad.hcl", "id", id, "mode", modes[m.id])
	}
	for _, m := range meshes {
		old[m] = jobs[m].Alloc("fragile")
		m.client.EventuallyGet("client", "http://"+m.id+"-f-fragile.virtual.consul/", nil)
		old[m].Kill("fragile")
	}
	var now []*nomad.Alloc
	for _, m := range meshes {
		var replaced *nomad.Alloc
		test.Eventually(t, func() error {
			list := jobs[m].Allocs()
			if len(list) == 0 || list[0].ID == old[m].ID || list[0].ClientStatus != "running" {
				return fmt.Errorf("allocations are %d", len(list))
			}
			replaced = list[0]
			return nil
		}, "another allocation")
		got := m.client.EventuallyGet("client", "http://"+m.id+"-f-fragile.virtual.consul/", func(got wire.Outcome) error {
			if got.Reply == nil || got.Reply.Alloc != replaced.ID {
				return fmt.Errorf("got %s, want an answer of %s", got, replaced.ID)
			}
			return nil
		})
		wantMesh(t, got, replaced, m.id+"-client")
		now = append(now, replaced)
	}
	wantOnlyMeshes(t, n, all, now...)
}
