// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"fmt"
	"os"
	"testing"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// Before the proxy listens, its task's name says who it is: nobody else under its
// UID leaves the mesh. One that restarts has another cgroup, and is recognised anew.
func TestAgentRecognisesAProxyThatDoesNotListen(t *testing.T) {
	n := newNode(t)
	n.config.CgroupRoot = ""
	n.Datapath = redirect.New(n.config.Paths())
	id := numbered(1)
	ns, key := n.transparent(id)
	scopes := test.NewCgroup(t)
	task := scopes.Child(t, id+".app.scope")
	n.fake.answers(say(200, fmt.Sprintf(`{"_nomad-task-%s-group-g-web-80-sidecar-proxy":{"Kind":"connect-proxy","Service":"web-sidecar-proxy","Port":20001}}`, id)))
	rogue := test.NewClient(t, test.Spec{NetNS: ns, Cgroup: task, UID: 101, GID: 101})
	n.run()
	n.eventually(id, api.StateManaged)
	dial := func(client *test.Client, want bpfmap.Verdict) {
		t.Helper()
		before := n.verdictsOf(key)
		_, _ = client.Ask("tcp4", "192.0.2.1:80") // nobody is there: the verdict counts
		after := n.verdictsOf(key)
		if after[want.String()] != before[want.String()]+1 {
			t.Errorf("verdicts were %v, and are %v after a dial; want one more %v", before, after, want)
		}
	}
	dial(rogue, bpfmap.Proxy) // nothing says who the proxy is
	for _, listens := range []bool{false, false, true} {
		scope := scopes.Child(t, id+".connect-proxy-web.scope")
		spec := test.Spec{NetNS: ns, Cgroup: scope, UID: 101, GID: 101}
		proxy := test.NewClient(t, spec)
		test.Eventually(t, func() error {
			if got := n.cgroupOf(key); got != scope.ID {
				return fmt.Errorf("the proxy's cgroup is %d, want %d", got, scope.ID)
			}
			return nil
		}, "the proxy to be known by its task")
		dial(rogue, bpfmap.RefusedNoProxy)
		dial(proxy, bpfmap.Proxy)
		if listens {
			test.EchoProcess(t, spec, "tcp4", "127.0.0.1:15001")
			dial(rogue, bpfmap.Redirected)
			dial(proxy, bpfmap.Proxy)
			break
		}
		proxy.Stop()
		if err := os.Remove(scope.Path); err != nil {
			t.Fatal(err)
		}
	}
	n.eventuallyTask(id, "connect-proxy-web")
}

func (n *node) verdictsOf(key workload.AttachmentID) map[string]uint64 {
	n.t.Helper()
	list, err := n.Verdicts()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, w := range list {
		if w.Key == key {
			return w.Counts
		}
	}
	n.t.Fatalf("no workload %s", key)
	return nil
}
