// SPDX-License-Identifier: MPL-2.0

package cluster

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// rollingUpdate replaces one instance after the other.
func rollingUpdate(t *testing.T, c *cluster) {
	old := c.servers()
	c.round++
	c.update(3, 0)
	c.settled(t, 3, old)
}

// canary has a new instance beside the old ones until it is promoted.
func canary(t *testing.T, c *cluster) {
	old := c.servers()
	c.round++
	c.update(3, 1)
	test.EventuallyIn(t, patience, func() error {
		if now := c.servers(); len(now) != len(old)+1 {
			return fmt.Errorf("%d instances", len(now))
		}
		return nil
	}, "a canary")
	c.answered()
	test.EventuallyIn(t, patience, func() error {
		_, err := c.leader.Try("nomad", "job", "promote", "-detach", "cluster")
		return err // until the canary is healthy
	}, "the canary to be promoted")
	c.settled(t, 3, old)
}

func scale(t *testing.T, c *cluster) {
	for _, count := range []int{2, 8, 1, 3} {
		c.update(count, 0)
		c.settled(t, count, nil)
		c.answered()
	}
}

// allocRestart restarts the tasks of an instance. Nomad registers its service again
// before they run.
func allocRestart(t *testing.T, c *cluster) {
	id := slices.Sorted(maps.Keys(c.servers()))[0]
	for _, more := range [][]string{{"-task", "server"}, {"-all-tasks"}} {
		c.leader.Command("nomad", append(append([]string{"alloc", "restart"}, more...), id)...)
		c.job.Await()
		c.answered()
	}
}

// allocCommands signals and stops instances, and asks by a process that Nomad starts in
// the task of a client.
func allocCommands(t *testing.T, c *cluster) {
	ids := slices.Sorted(maps.Keys(c.servers()))
	c.leader.Command("nomad", "alloc", "signal", "-s", "SIGUSR1", ids[1], "connect-proxy-cluster-server") // Envoy opens its logs anew
	c.answered()
	c.leader.Command("nomad", "alloc", "stop", "-detach", ids[2])
	c.settled(t, 3, map[string]string{ids[2]: ""})
	for _, each := range c.clients {
		text := c.leader.Command("nomad", "alloc", "exec", "-i=false", "-t=false", "-task", "client", each.alloc.ID, "app", "get", each.url())
		var got wire.Outcome
		if err := json.Unmarshal([]byte(text), &got); err != nil || !each.right(got) {
			t.Errorf("alloc exec: %s: got %s, %v", each.group, text, err)
		}
	}
}

// drain moves what runs on a machine to the others, and lets the machine take
// allocations again.
func drain(t *testing.T, c *cluster) { c.drain(t, c.members[0]) }

func (c *cluster) drain(t *testing.T, n *nomad.Node) {
	t.Helper()
	there := make(map[string]string)
	count := len(c.servers())
	for id, node := range c.servers() {
		if node == n.Name() {
			there[id] = node
		}
	}
	n.Command("nomad", "node", "drain", "-enable", "-self", "-yes", "-detach", "-ignore-system")
	c.settled(t, count, there)
	for id, node := range c.servers() {
		if node == n.Name() {
			t.Errorf("instance %s runs on %s, which is drained", id, node)
		}
	}
	n.Command("nomad", "node", "drain", "-disable", "-self", "-yes")
}

func systemGC(t *testing.T, c *cluster) {
	c.leader.Command("nomad", "system", "gc")
	ended := 0
	test.EventuallyIn(t, patience, func() error {
		ended = 0
		for _, m := range c.members {
			var list []struct{ ClientStatus, JobID string }
			m.NomadGet("/v1/allocations", &list)
			for _, a := range list {
				if a.JobID == "cluster" && a.ClientStatus != "running" {
					ended++
				}
			}
		}
		if ended > 0 {
			return fmt.Errorf("%d allocations have ended and are still known", ended)
		}
		return nil
	}, "Nomad to forget what has ended")
}

// each restarts a daemon of one machine after the other, in order, and then as a crash
// does. Nomad writes the address of an allocation to its disk in order of its end or
// once a minute, and fails an allocation whose address it finds nowhere: it is stopped
// before it is killed.
func (c *cluster) each(t *testing.T, nodes []*nomad.Node, of func(*nomad.Node) *nomad.Daemon) {
	t.Helper()
	for _, n := range nodes {
		d := of(n)
		d.Restart(t)
		c.answered()
		d.Kill(t)
		c.answered()
		d.Start(t)
		c.answered()
	}
}

// partition parts a machine that runs instances from all others until Consul has
// noticed: what is asked of those instances meanwhile is lost by anybody.
func partition(t *testing.T, c *cluster) {
	n := c.fill(t, c.members[1])
	n.Isolate()
	c.passing(t, n, false)
	c.answered()
	n.Rejoin()
	c.passing(t, n, true)
	c.job.Await()
}

// power takes the power from a machine that runs instances. When it is back, other
// instances take the place of those: Nomad's exec driver does not give a task that
// outlives a reboot its shared directory again.
func power(t *testing.T, c *cluster) {
	n := c.fill(t, c.members[0])
	old := make(map[string]string)
	for id, node := range c.servers() {
		if node == n.Name() {
			old[id] = node
		}
	}
	n.PowerOff()
	c.passing(t, n, false)
	c.answered()
	n.PowerOn()
	for id := range old {
		if out, err := n.Try("nomad", "alloc", "stop", "-detach", id); err != nil && !strings.Contains(err.Error(), "not found") {
			t.Errorf("stop %s: %v: %s", id, err, out)
		}
	}
	c.settled(t, len(c.servers()), old)
}

// fill makes sure that the machine runs an instance.
func (c *cluster) fill(t *testing.T, n *nomad.Node) *nomad.Node {
	t.Helper()
	old := c.servers()
	for _, node := range old {
		if node == n.Name() {
			return n
		}
	}
	c.round++
	c.update(6, 0, "parallel", "2")
	c.settled(t, 6, old)
	for _, node := range c.servers() {
		if node == n.Name() {
			return n
		}
	}
	t.Fatalf("no instance on %s: %v", n.Name(), c.servers())
	return nil
}

// passing waits until Consul's servers call a machine healthy or not.
func (c *cluster) passing(t *testing.T, n *nomad.Node, want bool) {
	t.Helper()
	test.EventuallyIn(t, patience, func() error {
		var checks []struct{ CheckID, Status string }
		c.leader.ConsulGet("/v1/health/node/"+n.Name(), &checks)
		for _, check := range checks {
			if check.CheckID == "serfHealth" && (check.Status == "passing") != want {
				return fmt.Errorf("%s is %s", n.Name(), check.Status)
			}
		}
		return nil
	}, "Consul to notice what became of "+n.Name())
}
