// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"fmt"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// Each change from Consul counts once for each allocation that it concerns, with the
// time that it took; what is written for another reason does not.
func TestConsulToKernelTime(t *testing.T) {
	n := newNode(t)
	n.ports = append(n.ports, mapped(20002))
	ids := n.full(2)
	counted := func() (count uint64, sum float64) {
		t.Helper()
		_, text := get(t, "http://"+n.agent.Status().Telemetry+"/metrics")
		for name, to := range map[string]func(float64){"count": func(v float64) { count = uint64(v) }, "sum": func(v float64) { sum = v }} {
			found := regexp.MustCompile(`(?m)^weir_consul_apply_seconds_` + name + ` (\S+)$`).FindStringSubmatch(text)
			if found == nil {
				t.Fatalf("no %s in:\n%s", name, text)
			}
			value, err := strconv.ParseFloat(found[1], 64)
			if err != nil {
				t.Fatal(err)
			}
			to(value)
		}
		return count, sum
	}
	before, spent := counted()

	began := time.Now()
	n.fake.answers(registeredAt(20002, ids...))
	n.agent.consul.Wake()
	n.allInSync(ids, 20002)
	test.Eventually(t, func() error {
		if count, _ := counted(); count != before+2 {
			return fmt.Errorf("%d changes are counted, want %d", count, before+2)
		}
		return nil
	}, "both changes to be counted")
	took := time.Since(began).Seconds()
	if _, sum := counted(); sum <= spent || sum-spent > 2*took {
		t.Errorf("two changes took %f s, want more than nothing and at most %f", sum-spent, 2*took)
	}

	// Somebody else writes another configuration: the agent puts its own back, and that
	// is no news from Consul.
	count, _ := counted()
	changes := n.agent.Status().Counts.Changes
	list, err := n.Records()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.SetMeshConfig(list[0].Key, workload.MeshConfig{InboundPort: 20002, Guard: workload.GuardOff}); err != nil {
		t.Fatal(err)
	}
	n.agent.trigger()
	test.Eventually(t, func() error {
		if now := n.agent.Status().Counts.Changes; now == changes {
			return fmt.Errorf("%d changes", now)
		}
		return nil
	}, "the agent to put its configuration back")
	if now, _ := counted(); now != count {
		t.Errorf("%d changes are counted, want %d as before", now, count)
	}
}
