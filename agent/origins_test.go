// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// A workload goes through ten times its budget of destinations while the agent
// runs and connections stay open: no refusal, no wrong origin, and what
// an open connection carries stays its own.
func TestAgentKeepsACrawlerFromRunningDry(t *testing.T) {
	n := newNode(t)
	n.config.CgroupRoot = "" // the test itself dials
	n.Datapath = redirect.New(n.config.Paths())
	budget := max(uint32(test.Scale(1024)), 128)
	ns := test.NewNetNS(t)
	key := workload.AttachmentID{ContainerID: numbered(1), IfName: "eth0"}
	err := n.Add(redirect.Attachment{Key: key, NetNS: ns.Path, Request: workload.Request{
		Network: "nomad", Job: workload.Job{AllocID: numbered(1)}, ProxyUID: 101, InboundPort: 20001, OutboundPort: 15001, Budget: budget,
	}})
	if err != nil {
		t.Fatal(err)
	}
	n.cached(numbered(1), ns.Path, transparentMesh)
	n.fake.answers(registered(numbered(1)))
	test.EchoProcess(t, test.Spec{NetNS: ns, Cgroup: test.NewCgroup(t), UID: 101, GID: 101}, "tcp4", "127.0.0.1:15001")
	n.run(func(a *Agent) { // without the rests, which are minutes
		a.resting, a.origins.IdleAfter, a.origins.FreeAfter = 0, 0, 0
	})
	n.eventually(numbered(1), api.StateManaged)

	dial := func(origin netip.AddrPort) (conn *net.TCPConn) {
		t.Helper()
		ns.Do(func() {
			made, err := net.Dial("tcp4", origin.String())
			if err != nil {
				t.Fatalf("dial %s: %v", origin, err)
			}
			conn = made.(*net.TCPConn)
		})
		var reply test.Reply
		if err := json.NewDecoder(conn).Decode(&reply); err != nil {
			t.Fatalf("read the proxy's reply: %v", err)
		}
		if reply.Origin != origin {
			t.Fatalf("dial %s: the proxy saw origin %s", origin, reply.Origin)
		}
		return conn
	}
	long := make(map[netip.AddrPort]*net.TCPConn)
	for i := range byte(16) {
		origin := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, i + 1}), 80)
		long[origin] = dial(origin)
		t.Cleanup(func() { long[origin].Close() })
	}
	for i := range 10 * budget {
		conn := dial(netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, byte(i >> 16), byte(i >> 8), byte(i)}), 8080))
		if err := conn.SetLinger(0); err != nil { // TIME_WAIT would carry the index for a minute
			t.Fatal(err)
		}
		conn.Close()
		if i%(budget/4) == 0 {
			n.eventuallyHolds(key, budget*3/4)
		}
	}
	for _, w := range n.verdicts(key) {
		if w.Counts[bpfmap.RefusedBudget.String()]+w.Counts[bpfmap.RefusedTable.String()] > 0 {
			t.Errorf("verdicts: %v, want no refusal", w.Counts)
		}
	}
	if freed := n.agent.Status().Counts.Freed; freed < uint64(9*budget) {
		t.Errorf("%d indexes were given back, want nearly all of %d", freed, 10*budget)
	}
	for origin, conn := range long {
		if now, err := test.AskAgain(conn); err != nil || now.Origin != origin || now.To != origin {
			t.Errorf("a connection to %s has origin %s for the proxy and peer %s for the task, %v", origin, now.Origin, now.To, err)
		}
		dial(origin).Close()
	}
}

// eventuallyHolds waits until the workload holds no more than most origins. It
// asks the agent to look, which on a quiet node it does every other second.
func (n *node) eventuallyHolds(key workload.AttachmentID, most uint32) {
	n.t.Helper()
	test.Eventually(n.t, func() error {
		n.agent.trigger()
		list, err := n.Workloads()
		if err != nil {
			return err
		}
		for _, w := range list {
			if w.Key == key && w.Origins > most {
				return fmt.Errorf("it holds %d origins", w.Origins)
			}
		}
		return nil
	}, "origins to be given back")
}

func (n *node) verdicts(key workload.AttachmentID) (found []inspect.WorkloadVerdicts) {
	n.t.Helper()
	list, err := n.Verdicts()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, w := range list {
		if w.Key == key {
			found = append(found, w)
		}
	}
	if len(found) != 1 {
		n.t.Fatalf("verdicts of %d workloads, want one", len(found))
	}
	return found
}
