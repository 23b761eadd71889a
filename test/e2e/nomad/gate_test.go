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

// startGate: tasks that dial in their first moment and end at the first error all
// succeed, although no Envoy listens when they start.
func startGate(t *testing.T, n *nomad.Node) {
	speaksHTTP(n, "gate-api", "gate-first")
	api := n.Run("testdata/jobs/gate-api.nomad.hcl").Alloc("api")
	const count = 10
	job := n.Run("testdata/jobs/gate-first.nomad.hcl", "count", fmt.Sprint(count)) // one that ends with an error ends the test
	var took []time.Duration
	for _, a := range job.Allocs() {
		var got wire.Outcome
		test.Eventually(t, func() error { return json.Unmarshal([]byte(a.Log("first", "stdout")), &got) }, "the first request to end")
		wantMesh(t, got, api, "gate-first")
		took = append(took, got.Took)
	}
	slices.Sort(took)
	t.Logf("the first requests took %s", took)
	// A connection that waits takes at least as long as its first retransmission.
	waited := 0
	for _, each := range took {
		if each >= time.Second {
			waited++
		}
	}
	if len(took) != count || waited == 0 {
		t.Errorf("%d of %d requests waited: where none does, the proxies listened before the tasks dialled, which shows nothing", waited, len(took))
	}
}
