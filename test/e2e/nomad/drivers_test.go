// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// TestDrivers: what the drivers' own options, daemons and life cycles do to tasks of
// the mesh. Docker keeps containers alive while its daemon is away.
func TestDrivers(t *testing.T) {
	node := nomad.Start(t, nomad.Options{Agent: "gate {\n  timeout = \"1m\"\n}", DockerArgs: []string{"--live-restore"}})
	speaksHTTP(node, "drivers-server", "drivers-client", "drivers-batch", "drivers-docker")
	image(node, "checked:node", `HEALTHCHECK --interval=1s CMD ["/usr/local/bin/app", "check", "http://127.0.0.1:8080/"]`)
	for _, each := range []struct {
		name string
		test func(*testing.T, *nomad.Node)
	}{
		{"Docker", dockerOptions},
		{"Batch", func(t *testing.T, n *nomad.Node) { batch(t, n, "batch") }},
		{"Sysbatch", func(t *testing.T, n *nomad.Node) { batch(t, n, "sysbatch") }},
	} {
		t.Run(each.name, func(t *testing.T) { each.test(t, node.For(t)) })
	}
	if !t.Failed() {
		node.ExpectNothingLeft()
	}
}

// image makes an image of app:node with one more instruction.
func image(n *nomad.Node, name, change string) {
	n.Command("docker", "create", "--name", "base", "app:node")
	n.Command("docker", "commit", "--change", change, "base", name)
	n.Command("docker", "rm", "base")
}

// dockerOptions: a container without capabilities whose root cannot be written, which
// Docker checks by a process of its own, works in the mesh, also while Docker's daemon
// is restarted and killed.
func dockerOptions(t *testing.T, n *nomad.Node) {
	job := n.Run("testdata/jobs/drivers.nomad.hcl")
	server, client := job.Alloc("server"), job.Alloc("client")
	const url = "http://drivers-server.virtual.consul/"
	wantMesh(t, client.EventuallyGet("client", url, nil), server, "drivers-client")
	healthy := func() {
		t.Helper()
		test.Eventually(t, func() error {
			text, err := n.Try("docker", "inspect", "-f", "{{.State.Health.Status}}", "server-"+server.ID)
			if err == nil && strings.TrimSpace(text) != "healthy" {
				err = fmt.Errorf("Docker calls it %s", text)
			}
			return err
		}, "Docker's health check")
	}
	healthy()
	inMesh := func(got wire.Outcome) bool {
		return got.OK() && got.Reply != nil && got.Reply.Alloc == server.ID && strings.Contains(got.Reply.ClientCert, "/svc/drivers-client")
	}
	loop := client.Loop("client", url)
	loop.Await(10, "answered", inMesh)
	before := []int{server.PID("server"), client.PID("client")}
	n.Docker.Restart(t)
	loop.Await(10, "answered after Docker's restart", inMesh)
	n.Docker.Kill(t)
	loop.Await(10, "answered without Docker", inMesh)
	n.Docker.Start(t)
	healthy()
	loop.Await(10, "answered after Docker's start", inMesh)
	list := loop.Stop()
	for _, got := range list {
		if !inMesh(got) {
			t.Errorf("lost: %s", got)
		}
	}
	t.Logf("%d requests while Docker was restarted", len(list))
	if now := []int{server.PID("server"), client.PID("client")}; now[0] != before[0] || now[1] != before[1] {
		t.Errorf("the tasks are processes %d, they were %d: Docker did not keep them", now, before)
	}
	for _, a := range []*nomad.Alloc{server, client} {
		a.EventuallyWorkload("a workload without problems", func(w nomad.Workload) bool {
			return w.Mode == "transparent" && w.Proxy.Listeners == 2 && len(w.Problems) == 0 && w.Agent != nil && len(w.Agent.Problems) == 0
		})
	}
	job.Stop()
	// Nomad 1.11.1 takes a task for ended when its connection to Docker's daemon ends, and
	// leaves the container that the daemon keeps alive.
	if left := strings.Fields(n.Command("docker", "ps", "--all", "--quiet")); len(left) > 0 {
		n.Command("docker", append([]string{"rm", "--force"}, left...)...)
	}
}

// batch: tasks that end, of two drivers, dial the mesh in their first moment and end with
// their sidecars, and their networks go.
func batch(t *testing.T, n *nomad.Node, kind string) {
	servers := n.Run("testdata/jobs/drivers.nomad.hcl")
	server := servers.Alloc("server")
	servers.Alloc("client").EventuallyGet("client", "http://drivers-server.virtual.consul/", nil) // it is there to be asked
	job := n.Submit("testdata/jobs/drivers-batch.nomad.hcl", "type", kind)
	asked := 0
	test.EventuallyIn(t, time.Minute, func() error {
		asked = 0
		for _, a := range job.Allocs() {
			if a.ClientStatus == "failed" {
				t.Fatalf("allocation %s failed:\n%s", a.ID, a.Events())
			}
			if a.ClientStatus != "complete" {
				return fmt.Errorf("allocation %s of %s is %s:\n%s", a.ID, a.Group, a.ClientStatus, a.Events())
			}
			asked++
		}
		if asked != 2 {
			return fmt.Errorf("%d allocations", asked)
		}
		return nil
	}, "both groups to end")
	for _, a := range job.Allocs() {
		var got wire.Outcome
		if err := json.Unmarshal([]byte(a.Log("ask", "stdout")), &got); err != nil {
			t.Fatal(err)
		}
		wantMesh(t, got, server, "drivers-"+a.Group)
	}
	job.Stop()
	servers.Stop()
}
