// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
)

func TestEndedWhileNomadWasDown(t *testing.T) {
	n := nomad.Start(t, nomad.Options{})
	job := n.Run("testdata/jobs/ended.nomad.hcl", "id", "endeda")
	for _, a := range job.Allocs() {
		t.Log(a.Group, a.ID)
	}
	old := job.Allocs()
	n.Command("nomad", "job", "stop", "-detach", job.ID)
	_ = old
	test.Eventually(t, func() error {
		var services map[string]any
		n.ConsulGet("/v1/agent/services", &services)
		for id := range services {
			if strings.Contains(id, job.ID) {
				return fmt.Errorf("service %s is still there", id)
			}
		}
		return nil
	}, "the end of its services")
	n.Nomad.Kill(t)
	n.Nomad.Start(t)
	show := func(args ...string) {
		out, err := n.Try(args[0], args[1:]...)
		t.Logf("$ %v\n%s%v", args, out, err)
	}
	_ = exec.Command
	all := func() {
		show("sh", "-c", "ps -e -o pid,args | grep -v -e ' ps '")
		show("sh", "-c", "ls -l /run/netns /run/docker/netns /var/lib/cni/results /run/cni/* /run/weir/workloads /run/weir/networks /run/weir/leases/* /sys/fs/bpf/weir/lookups")
		show("sh", "-c", "mount | grep nsfs")
		show("ip", "-o", "link")
		show("nft", "list", "ruleset")
		show("docker", "ps", "-a")
		show("weir", "status")
		show("weir", "workloads")
		show("nomad", "job", "status", job.ID)
		t.Log(n.Leftovers())
		for _, port := range []string{"28101", "28102", "28103"} {
			t.Log(port, n.Get(n.Neighbour(), "http://"+nomad.NodeAddress+":"+port+"/"))
		}
	}
	time.Sleep(20 * time.Second)
	all()
	again := n.Run("testdata/jobs/ended.nomad.hcl", "id", "endedb")
	for _, a := range again.Allocs() {
		t.Log(a.Group, a.ID)
	}
	all()
	t.Log(n.Nomad.Tail(8000))
	t.Fail()
}
