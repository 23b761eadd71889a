// SPDX-License-Identifier: MPL-2.0

package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cni/ended"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/workload"
)

func TestStatusNamesWhatIsLeftBehind(t *testing.T) {
	n := leftBehind()
	n.status = healthy()
	want(t, try(t, n, nil, "status"), outcome{stdout: `healthy: 2 workloads; no agent runs, so plain connect jobs are not guarded

agent: none runs, so nothing follows Consul, only allocations with
  transparent_proxy are under Weir, and what they dial before their proxy
  listens is refused
  next: 'systemctl enable --now weir-agent', or run weir.nomad.hcl, Nomad's
  system job for it

left behind: the network of 1 allocation that is over, take it away with 'weir
  gc'
empty: nothing runs in the namespace of 1 allocation, which is over or about
  to start a task, see 'weir gc -dry-run'
`})
}

// A host port that leads to an ended allocation is a port of a service that cannot
// be reached: the node is not healthy, whatever runs on it.
func TestStatusOfPortsThatLeadNowhere(t *testing.T) {
	n := leftBehind()
	n.status, n.agent = healthy(), &api.Status{}
	heir := workload.AttachmentID{ContainerID: "77aa00bb-7c0f-4d0e-9a51-2f6c8e1d0b02", IfName: "eth0"}
	n.left[0].Shadows = []ended.Shadow{{Port: 28101, Protocol: "tcp", By: &heir, Job: workload.Job{ID: "demo", Group: "new"}}}
	n.left[1].Shadows = []ended.Shadow{{Port: 8443, Protocol: "udp"}}
	wanted := []health.Problem{
		health.NewProblem(health.ProblemHostPortTaken, "run 'weir gc'",
			"it has no process any more and still holds host port 28101/tcp of demo/new/77aa00bb, which runs: connections to it from outside are lost").
			Of("allocation demo/web/0b5d0c1e", n.left[0].Key.ContainerID),
		health.NewProblem(health.ProblemHostPortTaken, "where 'nomad alloc status 6e1d0a01' says that it ended, run 'weir gc -empty 6e1d0a01'",
			"it has no process any more and still holds host port 8443/udp on which a process of the node itself listens: connections to it from outside are lost").
			Of("allocation demo/db/6e1d0a01", n.left[1].Key.ContainerID),
	}
	got := try(t, n, nil, "status")
	words := strings.Join(strings.Fields(got.stdout), " ") // whatever line they are on
	if got.code != 1 || !strings.HasPrefix(words, "not healthy: 2 problems "+wanted[0].Text()+" remedy: run 'weir gc' "+wanted[1].Text()+" ") {
		t.Errorf("status ends with %d:\n%s", got.code, got.stdout)
	}
	got = try(t, n, nil, "status", "-json")
	var told struct{ Problems []health.Problem }
	if err := json.Unmarshal([]byte(got.stdout), &told); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(wanted, told.Problems); got.code != 1 || diff != "" {
		t.Errorf("status -json ends with %d (-want +got):\n%s", got.code, diff)
	}
}
