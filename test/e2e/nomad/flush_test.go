// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
)

// flushedRules: a firewall that is loaded anew flushes what others made, host ports
// too. The agent puts them back without Nomad, which makes no CHECK meanwhile.
func flushedRules(t *testing.T, n *nomad.Node) {
	const atMost = 15 * time.Second // the agent looks every ten
	a := n.Run("testdata/jobs/add-own.nomad.hcl", "id", "flushed", "mode", "cni/weir", "port", "http", "args", "{}").Alloc("task")
	host, _ := a.Port("http")
	url := fmt.Sprintf("http://%s:%d/", nomad.NodeAddress, host)
	reached := func() error {
		if got := n.Get(n.Neighbour(), url); got.Reply == nil || got.Reply.Alloc != a.ID {
			return fmt.Errorf("got %s, want an answer of %s", got, a.ID)
		}
		return nil
	}
	test.Eventually(t, reached, "the host port to be reached")
	const repaired = "network repaired"
	before := strings.Count(n.Agent.Log(t), repaired)
	n.Command("nft", "flush", "ruleset")
	test.EventuallyIn(t, atMost, func() error {
		if log := n.Agent.Log(t); strings.Count(log, repaired) == before {
			return fmt.Errorf("the agent's log has no new %q", repaired)
		}
		return reached()
	}, "the host port to be reached again")
}
