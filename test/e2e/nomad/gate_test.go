// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// TestStartGate: tasks that dial in their first moment and end at the first error all
// succeed, although no Envoy listens when they start: by a virtual IP through the
// proxy's outbound listener, by one that leads to an explicit upstream, and by the
// local port of an upstream in a plain job; with exec and with Docker.
func TestStartGate(t *testing.T) {
	n := nomad.Start(t, nomad.Options{Agent: "gate {\n  timeout = \"1m\"\n}"})
	speaksHTTP(n, "gate-api", "gate-implicit", "gate-explicit", "gate-plain", "gate-docker")
	api := n.Run("testdata/jobs/gate-api.nomad.hcl").Alloc("api")
	const count = 4
	job := n.Run("testdata/jobs/gate-first.nomad.hcl", "count", fmt.Sprint(count)) // one that ends with an error ends the test
	took := make(map[string][]time.Duration)
	for _, a := range job.Allocs() {
		var got wire.Outcome
		test.Eventually(t, func() error { return json.Unmarshal([]byte(a.Log(a.Group, "stdout")), &got) }, "the first request to end")
		wantMesh(t, got, api, "gate-"+a.Group)
		took[a.Group] = append(took[a.Group], got.Took)
	}
	t.Logf("the first requests took %s", took)
	for _, group := range []string{"implicit", "explicit", "plain", "docker"} {
		// A connection that waits takes at least as long as its first retransmission.
		waited := slices.ContainsFunc(took[group], func(took time.Duration) bool { return took >= time.Second })
		if len(took[group]) != count || !waited {
			t.Errorf("group %s: %s: want %d, and where none waits the proxies listened before the tasks dialled, which shows nothing", group, took[group], count)
		}
	}
}
