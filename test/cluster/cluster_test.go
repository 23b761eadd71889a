// SPDX-License-Identifier: MPL-2.0

// Package cluster runs a cluster of four machines: see test/nomad.
package cluster

import (
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
)

const (
	jobFile  = "testdata/cluster.nomad.hcl"
	patience = 3 * time.Minute
)

// TestCluster asks on and on, from a transparent and from a plain client, for a
// service whose instances run on other machines, while those are updated, moved, cut
// off and lose one daemon after the other. Each answer has to come through both proxies
// from an instance of the job, and each client has to see the address that it dialled.
// The same is done with Consul's own engine: where that loses nothing, Weir may not.
func TestCluster(t *testing.T) {
	ours, peers := make(results), make(results)
	engine := filepath.Join(nomad.Build(t, "test/bench", "./engine"), "engine")
	t.Run("Consul", func(t *testing.T) { play(t, startPeer(t, engine), peers) })
	t.Run("Weir", func(t *testing.T) { play(t, startWeir(t, engine), ours) })
	if len(ours) > 0 && len(peers) > 0 { // both were asked for
		compare(t, ours, peers)
	}
}

// cluster is a leader, which has the servers of Nomad and of Consul and runs the
// clients, and members, which run what they ask.
type cluster struct {
	leader  *nomad.Node
	members []*nomad.Node
	weir    *weir // nil: with Consul's engine

	job     *nomad.Job
	clients []*client
	round   int // of the last update
}

func startPeer(t *testing.T, engine string) *cluster {
	options := nomad.Options{NoDocker: true, NoWeir: true, Plugin: engine}
	c := &cluster{leader: nomad.Start(t, options)}
	for range 3 {
		c.members = append(c.members, c.leader.Join(options))
	}
	return c
}

func (c *cluster) nodes() []*nomad.Node { return append([]*nomad.Node{c.leader}, c.members...) }

// scene is something that happens to a cluster.
type scene struct {
	name string
	run  func(*testing.T, *cluster)
	weir bool // there is nothing that it could be done to with Consul's engine
	// lossy is why requests may be lost whoever redirects, more or fewer by chance.
	lossy string
}

func scenes() []scene {
	consul := func(n *nomad.Node) *nomad.Daemon { return n.Consul }
	client := func(n *nomad.Node) *nomad.Daemon { return n.Nomad }
	return []scene{
		{name: "rolling update", run: rollingUpdate},
		{name: "canary and promote", run: canary},
		{name: "scale 2, 8, 1", run: scale},
		{name: "alloc restart", run: allocRestart, lossy: "Nomad registers an instance before its tasks run again"},
		{name: "alloc signal, stop, exec", run: allocCommands},
		{name: "node drain", run: drain},
		{name: "system gc", run: systemGC},
		{name: "Nomad's clients", run: func(t *testing.T, c *cluster) { c.each(t, c.nodes(), client) }},
		{name: "Nomad's server", run: func(t *testing.T, c *cluster) {
			c.each(t, []*nomad.Node{c.leader}, func(n *nomad.Node) *nomad.Daemon { return n.Server })
		}},
		{name: "Consul's clients", run: func(t *testing.T, c *cluster) { c.each(t, c.members, consul) }},
		{name: "Consul's server", run: func(t *testing.T, c *cluster) { c.each(t, []*nomad.Node{c.leader}, consul) },
			lossy: "a server that starts gives the Envoys of its machine no upstream listener at first"},
		{name: "Weir's agents", run: agents, weir: true},
		{name: "system job upgraded and downgraded", run: systemJob, weir: true},
		{name: "migration and back", run: migration, weir: true},
		{name: "node partitioned", run: partition, lossy: "Consul has to notice"},
		{name: "power lost and back", run: power, lossy: "Consul has to notice, twice"},
	}
}

// results are what came of the requests during each scene, by its name and the client.
type results map[string]map[string]tally

// play plays all scenes on a cluster and writes down what came of the requests.
func play(t *testing.T, c *cluster, told results) {
	for _, service := range []string{"cluster-server", "cluster-transparent", "cluster-plain"} {
		c.leader.ConfigEntry(map[string]any{"Kind": "service-defaults", "Name": service, "Protocol": "http"})
	}
	c.job = c.leader.Run(jobFile, "round", "0")
	c.wantSpread(t)
	c.clients = startClients(t, c.job)
	c.answered()
	for _, s := range scenes() {
		if s.weir && c.weir == nil {
			continue
		}
		began := time.Now()
		before := c.counts()
		s.run(t, c)
		c.answered()
		told[s.name] = make(map[string]tally)
		for i, each := range c.clients {
			tally := each.tally(before[i])
			if told[s.name][each.group] = tally; tally.lost+tally.wrong > 0 {
				t.Logf("%s: %s: the first one lost: %s, the last: %s", s.name, each.group, tally.first, tally.last)
			}
		}
		t.Logf("%s: %s: %v", time.Since(began).Round(time.Second), s.name, told[s.name])
	}
	for _, each := range c.clients {
		list := each.loop.Stop()
		t.Logf("%s: %d requests in all, answered by %d instances", each.group, len(list), len(each.instances))
	}
	c.job.Stop()
	if c.weir == nil {
		return
	}
	c.weir.system.Stop()
	for _, n := range c.nodes() {
		test.EventuallyIn(t, patience, n.Leftovers, "nothing to be left on "+n.Name())
	}
}

// compare prints what both have lost, and wants nothing lost where the peer lost nothing,
// but for scenes in which that is chance.
func compare(t *testing.T, ours, peers results) {
	table := fmt.Sprintf("%-36s %-12s %22s %22s\n", "requests, lost", "client", "Weir", "Consul's engine")
	for _, s := range scenes() {
		for _, group := range groups() {
			our, peer := ours[s.name][group], peers[s.name][group]
			table += fmt.Sprintf("%-36s %-12s %22s %22s\n", s.name, group, our, peer)
			if our.lost > 0 && peer.lost == 0 && s.lossy == "" || our.lost > our.asked/2 {
				t.Errorf("%s: %s: %d of %d requests lost, Consul's engine loses %d; the first: %s",
					s.name, group, our.lost, our.asked, peer.lost, our.first)
			}
			if our.asked == 0 || peer.asked == 0 && !s.weir {
				t.Errorf("%s: %s: it was not played", s.name, group)
			}
			for who, told := range map[string]tally{"Weir": our, "Consul's engine": peer} {
				if told.wrong > 0 {
					t.Errorf("%s: %s: %s: %d of %d requests came to a wrong end; the first: %s", s.name, group, who, told.wrong, told.asked, told.first)
				}
			}
		}
	}
	t.Logf("\n%s", table)
}

// wantSpread wants an instance on each member.
func (c *cluster) wantSpread(t *testing.T) {
	t.Helper()
	var on, want []string
	for _, node := range c.servers() {
		on = append(on, node)
	}
	for _, m := range c.members {
		want = append(want, m.Name())
	}
	slices.Sort(on)
	if !slices.Equal(on, want) {
		t.Fatalf("the instances run on %q, want them on %q", on, want)
	}
}

// servers are the instances that Nomad wants to run, with their nodes.
func (c *cluster) servers() map[string]string { return instances(c.job, "server") }

// instances are the allocations of a group that Nomad wants to run, with their nodes.
func instances(job *nomad.Job, group string) map[string]string {
	list := make(map[string]string)
	for _, a := range job.Allocs() {
		if a.Group == group {
			list[a.ID] = a.NodeName
		}
	}
	return list
}

// update gives the job to Nomad with another number of instances, and others of them
// where the round is another one.
func (c *cluster) update(count, canaries int, more ...string) {
	c.job.Update(jobFile, append([]string{"round", fmt.Sprint(c.round), "count", fmt.Sprint(count), "canaries", fmt.Sprint(canaries)}, more...)...)
}

// settled waits until so many instances run, none of them one of the old, and no other.
func (c *cluster) settled(t *testing.T, count int, old map[string]string) {
	t.Helper()
	settled(t, c.job, "server", count, old)
}

func settled(t *testing.T, job *nomad.Job, group string, count int, old map[string]string) {
	t.Helper()
	test.EventuallyIn(t, patience, func() error {
		now := instances(job, group)
		for id := range now {
			if _, ok := old[id]; ok {
				return fmt.Errorf("instance %s is still wanted", id)
			}
		}
		if len(now) != count {
			return fmt.Errorf("%d instances are wanted, not %d", len(now), count)
		}
		return nil
	}, "other instances")
	job.Await()
	test.EventuallyIn(t, patience, job.Ended, "the end of the old ones")
}
