// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// An allocation whose tasks dial more addresses than it may is not healthy, and the
// node says which one.
func TestRefusedConnectionIsAProblemOfItsAllocation(t *testing.T) {
	n := newNode(t)
	cgroup := test.NewCgroup(t)
	n.config.CgroupRoot = cgroup.Path
	n.Datapath = redirect.New(n.config.Paths())
	ids := []string{numbered(1), numbered(2)}
	quiet, _ := n.transparent(ids[0])
	greedy, key := n.transparent(ids[1])
	request := workload.Request{Network: "nomad", Job: workload.Job{AllocID: ids[1]}, Mode: workload.ModeTransparent, ProxyUID: 101, InboundPort: 20001, OutboundPort: 15001, Budget: 2}
	if err := n.Add(redirect.Attachment{Key: key, NetNS: greedy.Path, Request: request}); err != nil {
		t.Fatal(err)
	}
	n.fake.answers(registered(ids...))
	for _, ns := range []*test.NetNS{quiet, greedy} {
		test.EchoProcess(t, test.Spec{NetNS: ns, Cgroup: cgroup.Child(t, fmt.Sprint("envoy", ns.Cookie())), UID: 101, GID: 101}, "tcp4", "127.0.0.1:15001")
	}
	n.run(func(a *Agent) { a.counting = 50 * time.Millisecond })
	n.eventually(ids[0], api.StateManaged)
	task := test.NewClient(t, test.Spec{NetNS: greedy, Cgroup: cgroup.Child(t, "task"), UID: 1000, GID: 1000})
	dialled := 0
	var codes []string
	test.Eventually(t, func() error {
		dialled++ // the first look at the counters is where counting begins
		_, _ = task.Ask("tcp4", netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(dialled)}), 80).String())
		codes = nil
		for _, problem := range n.eventually(ids[1], api.StateManaged).Problems {
			codes = append(codes, problem.Code)
		}
		if !slices.Contains(codes, "refused_budget") {
			return fmt.Errorf("its problems are %v after %d addresses", codes, dialled)
		}
		return nil
	}, "the refusals to be a problem")
	for _, problem := range n.eventually(ids[0], api.StateManaged).Problems {
		if strings.HasPrefix(problem.Code, "refused_") {
			t.Errorf("the other allocation has %s", problem)
		}
	}
	counted := `weir_problems{code="refused_budget",severity="error"} 1`
	test.Eventually(t, func() error { return n.metric(counted) }, "the metric to count it")
}
