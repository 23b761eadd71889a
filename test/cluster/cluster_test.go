// SPDX-License-Identifier: MPL-2.0

// Package cluster runs a cluster of four machines: see test/nomad.
package cluster

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

const (
	jobFile  = "testdata/cluster.nomad.hcl"
	patience = 2 * time.Minute
)

// TestCluster asks on and on, from a transparent and from a plain client, for a
// service whose instances run on other machines, while those are updated, drained
// and lose one daemon after the other. Each answer has to come through both proxies
// from an instance of the job, and each client has to see the address that it
// dialled. Nothing may be lost.
func TestCluster(t *testing.T) {
	leader := nomad.Start(t, nomad.Options{NoDocker: true})
	var members []*nomad.Node
	for range 3 {
		members = append(members, leader.Join(nomad.Options{NoDocker: true}))
	}
	for _, service := range []string{"cluster-server", "cluster-transparent", "cluster-plain"} {
		leader.ConfigEntry(map[string]any{"Kind": "service-defaults", "Name": service, "Protocol": "http"})
	}
	job := leader.Run(jobFile, "round", "1")
	wantSpread(t, job, members)

	virtual := lookup(t, job)
	clients := []*client{
		ask(job, "transparent", netip.AddrPortFrom(virtual, 80)),
		ask(job, "plain", netip.MustParseAddrPort("127.0.0.1:9400")),
	}
	answered := func() {
		t.Helper()
		for _, c := range clients {
			c.loop.Await(20, c.group+" is answered", c.right)
		}
	}
	answered()
	all := append([]*nomad.Node{leader}, members...)
	for _, step := range []struct {
		name string
		run  func()
	}{
		{"rolling update", func() { update(t, job) }},
		{"drain", func() { drain(t, job, members) }},
		{"Weir's agents", func() { each(t, all, func(n *nomad.Node) *nomad.Daemon { return n.Agent }, answered) }},
		{"Nomad's clients", func() { each(t, all, func(n *nomad.Node) *nomad.Daemon { return n.Nomad }, answered) }},
		{"Consul's clients", func() { each(t, members, func(n *nomad.Node) *nomad.Daemon { return n.Consul }, answered) }},
		{"Nomad's server", func() { each(t, all[:1], func(n *nomad.Node) *nomad.Daemon { return n.Server }, answered) }},
	} {
		before := counts(clients)
		step.run()
		answered()
		for i, c := range clients {
			c.wantNothingLost(t, step.name, before[i])
		}
	}
	for _, c := range clients {
		total := len(c.loop.Stop())
		t.Logf("%s: %d requests in all, answered by %d instances", c.group, total, len(c.instances))
	}
	job.Stop()
	for _, n := range all {
		test.EventuallyIn(t, patience, n.Leftovers, "nothing to be left on "+n.Name())
	}
}

// wantSpread wants the instances on other machines than the clients.
func wantSpread(t *testing.T, job *nomad.Job, members []*nomad.Node) {
	t.Helper()
	var nodes []string
	for _, a := range job.Allocs() {
		if a.Group == "server" {
			nodes = append(nodes, a.NodeName)
		}
	}
	slices.Sort(nodes)
	var want []string
	for _, m := range members {
		want = append(want, m.Name())
	}
	if !slices.Equal(nodes, want) {
		t.Fatalf("the servers run on %q, want them on %q", nodes, want)
	}
}

// lookup is the service's virtual IP, which can be asked without Consul's DNS.
func lookup(t *testing.T, job *nomad.Job) netip.Addr {
	t.Helper()
	got := job.Alloc("transparent").App("client", "lookup", "cluster-server.virtual.consul")
	if len(got.Addresses) != 1 {
		t.Fatalf("look up the server: %s", got)
	}
	return netip.MustParseAddr(got.Addresses[0])
}

// client asks from the allocation of a group.
type client struct {
	group     string
	target    netip.AddrPort
	loop      *nomad.Loop
	instances map[string]bool // that have answered
}

func ask(job *nomad.Job, group string, target netip.AddrPort) *client {
	c := &client{group: group, target: target, instances: make(map[string]bool)}
	alloc := job.Alloc(group)
	url := "http://" + target.String() + "/"
	alloc.EventuallyGet("client", url, func(got wire.Outcome) error {
		if !c.right(got) {
			return fmt.Errorf("got %s", got)
		}
		return nil
	})
	c.loop = alloc.Loop("client", url)
	return c
}

// right tells an answer of an instance, through both proxies, to who has dialled
// and still sees the target.
func (c *client) right(got wire.Outcome) bool {
	if !got.OK() || got.Reply == nil || got.Reply.Job != "cluster" || got.Reply.Task != "server" {
		return false
	}
	c.instances[got.Reply.Alloc] = true
	return got.To == c.target.String() && strings.HasPrefix(got.Reply.Remote, "127.0.0.1:") &&
		strings.Contains(got.Reply.ClientCert, "/svc/cluster-"+c.group)
}

func (c *client) wantNothingLost(t *testing.T, what string, before int) {
	t.Helper()
	since := c.loop.Outcomes()[before:]
	if lost := slices.DeleteFunc(slices.Clone(since), c.right); len(lost) > 0 {
		t.Errorf("%s: %s: %d of %d requests lost, the first: %s, the last: %s", what, c.group, len(lost), len(since), lost[0], lost[len(lost)-1])
	}
	t.Logf("%s: %s: %d requests", what, c.group, len(since))
}

func counts(clients []*client) (list []int) {
	for _, c := range clients {
		list = append(list, len(c.loop.Outcomes()))
	}
	return list
}

// update replaces one instance after the other.
func update(t *testing.T, job *nomad.Job) {
	old := servers(job)
	job.Update(jobFile, "round", "2")
	replaced(t, job, old, len(old))
}

// drain moves what runs on a machine to the others, and lets the machine take
// allocations again.
func drain(t *testing.T, job *nomad.Job, members []*nomad.Node) {
	old := servers(job)
	there := make(map[string]int)
	for _, node := range old {
		there[node]++
	}
	full := slices.IndexFunc(members, func(n *nomad.Node) bool { return there[n.Name()] > 0 })
	n := members[full]
	n.Command("nomad", "node", "drain", "-enable", "-self", "-yes", "-detach")
	replaced(t, job, old, there[n.Name()])
	for id, node := range servers(job) {
		if node == n.Name() {
			t.Errorf("server %s still runs on %s", id, node)
		}
	}
	n.Command("nomad", "node", "drain", "-disable", "-self", "-yes")
}

// replaced waits until that many of the old servers are over and as many new ones
// pass their checks.
func replaced(t *testing.T, job *nomad.Job, old map[string]string, count int) {
	t.Helper()
	test.EventuallyIn(t, patience, func() error {
		kept := 0
		for id := range servers(job) {
			if _, ok := old[id]; ok {
				kept++
			}
		}
		if kept != len(old)-count {
			return fmt.Errorf("%d of %d servers are the old ones, want %d", kept, len(old), len(old)-count)
		}
		return nil
	}, "new servers")
	job.Await()
	test.EventuallyIn(t, patience, job.Ended, "the end of the old ones")
}

// servers are those that Nomad wants to run, with their nodes.
func servers(job *nomad.Job) map[string]string {
	list := make(map[string]string)
	for _, a := range job.Allocs() {
		if a.Group == "server" {
			list[a.ID] = a.NodeName
		}
	}
	return list
}

// each kills a daemon of one machine after the other, starts it again, and then
// does so in order.
func each(t *testing.T, nodes []*nomad.Node, of func(*nomad.Node) *nomad.Daemon, answered func()) {
	for _, n := range nodes {
		d := of(n)
		d.Kill(t)
		answered()
		d.Start(t)
		answered()
		d.Restart(t)
		answered()
	}
}
