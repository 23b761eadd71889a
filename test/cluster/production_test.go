// SPDX-License-Identifier: MPL-2.0

package cluster

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/consul"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// TestProduction runs the cluster as production does: what no token allows is denied in
// Consul and in Nomad, Consul speaks TLS alone and asks its clients for certificates,
// workloads have identities as "nomad setup consul" makes them, the guard is enforced,
// and the agents have the policy of docs/install.md and nothing else. Tokens and
// certificates are replaced under load, and nothing is lost.
func TestProduction(t *testing.T) {
	p := &production{t: t, accessors: make(map[*nomad.Node]string)}
	c := &p.cluster
	options := nomad.Options{NoDocker: true, Secure: true, Agent: gate + nomad.SecureAgent + "guard {\n  default = \"enforce\"\n}\n"}
	c.leader = nomad.Start(t, options)
	for range 3 {
		c.members = append(c.members, c.leader.Join(options))
	}
	for _, n := range c.nodes() {
		p.giveToken(n)
	}
	services := []string{"cluster-server", "cluster-transparent", "cluster-plain"}
	for _, service := range services {
		c.leader.ConfigEntry(map[string]any{"Kind": "service-defaults", "Name": service, "Protocol": "http"})
	}
	c.job = c.leader.Run(jobFile, "round", "0")
	c.wantSpread(t)
	p.denied()
	for _, service := range services[1:] {
		c.leader.Intend(service, "cluster-server", "allow")
	}
	c.clients = startClients(t, c.job)
	c.answered()
	p.content()
	p.guarded()

	consulOf := func(n *nomad.Node) *nomad.Daemon { return n.Consul }
	clientOf := func(n *nomad.Node) *nomad.Daemon { return n.Nomad }
	for _, s := range []scene{
		{name: "rolling update", run: rollingUpdate},
		{name: "tokens replaced", run: func(*testing.T, *cluster) { p.replaceTokens() }},
		{name: "certificates replaced", run: func(*testing.T, *cluster) { p.replaceCertificates() }},
		{name: "node drain", run: drain},
		{name: "Consul's clients", run: func(t *testing.T, c *cluster) { c.each(t, c.members, consulOf) }},
		{name: "Nomad's clients", run: func(t *testing.T, c *cluster) { c.each(t, c.nodes(), clientOf) }},
	} {
		before := c.counts()
		s.run(t, c)
		c.answered()
		for i, each := range c.clients {
			told := each.tally(before[i])
			t.Logf("%s: %s: %d requests, %d lost", s.name, each.group, told.asked, told.lost)
			if told.lost+told.wrong > 0 {
				t.Errorf("%s: %s: %d of %d requests lost, %d wrong; the first: %s, the last: %s",
					s.name, each.group, told.lost, told.asked, told.wrong, told.first, told.last)
			}
		}
	}
	p.content()
	p.guarded()
}

// production is a cluster whose agents have tokens.
type production struct {
	cluster

	t         *testing.T
	accessors map[*nomad.Node]string // of the tokens that the agents have
	tokens    int                    // made so far
}

// giveToken gives a node's agent a new token with the documented policy.
func (p *production) giveToken(n *nomad.Node) {
	p.t.Helper()
	p.tokens++
	secret := fmt.Sprintf("8e3b0b4c-7d0a-4a52-9d3e-2f3a6f4c9b%02d", p.tokens)
	rules := strings.ReplaceAll(consul.DocumentedPolicy(p.t), `"node"`, `"`+n.Name()+`"`)
	p.accessors[n] = p.leader.NewConsulToken(fmt.Sprintf("weir-%d", p.tokens), rules, secret)
	n.Write("/etc/weir.d/token", secret, 0o600)
}

// denied: without an intention nobody is let through, in a cluster that denies what
// nothing allows.
func (p *production) denied() {
	p.t.Helper()
	p.job.Alloc("plain").EventuallyGet("client", "http://127.0.0.1:9400/", func(got wire.Outcome) error {
		if got.Status != 403 {
			return fmt.Errorf("got %s, want Envoy's 403", got)
		}
		return nil
	})
}

// content: no agent has a problem, with Consul or with a workload.
func (p *production) content() {
	p.t.Helper()
	for _, n := range p.nodes() {
		test.EventuallyIn(p.t, patience, func() error {
			var status struct {
				Problems []health.Problem
				Agent    *struct{ Consul api.ConsulStatus }
			}
			if err := n.Weir(&status, "status", "-json"); err != nil {
				return err
			}
			if len(status.Problems) > 0 || status.Agent == nil || !status.Agent.Consul.InSync {
				return fmt.Errorf("problems %+v, agent %+v", status.Problems, status.Agent)
			}
			return p.workloadsContent(n)
		}, "no problem on "+n.Name())
	}
}

func (p *production) workloadsContent(n *nomad.Node) error {
	var problems []error
	for _, w := range n.Workloads() {
		if w.Agent == nil || len(w.Problems)+len(w.Agent.Problems) > 0 || w.Guard != "enforce" {
			problems = append(problems, fmt.Errorf("workload %s on %s: %+v, guard %s", w.ID, n.Name(), w.Problems, w.Guard))
		}
	}
	return errors.Join(problems...)
}

// guarded: nobody reaches an instance past its proxy.
func (p *production) guarded() {
	p.t.Helper()
	for _, m := range p.members {
		for _, w := range m.Workloads() {
			if got := m.Get(m.NetNS(), "http://"+w.Addresses[0]+":8080/"); got.Reply != nil {
				p.t.Errorf("instance %s on %s is reached past its proxy: %s", w.ID, m.Name(), got)
			}
		}
	}
}

// replaceTokens gives each agent another token and revokes the one that it had. What
// comes afterwards it can only learn by the new one.
func (p *production) replaceTokens() {
	for _, n := range p.nodes() {
		former := p.accessors[n]
		p.giveToken(n)
		p.leader.RevokeConsulToken(former)
	}
	rollingUpdate(p.t, &p.cluster)
	p.content()
}

// replaceCertificates gives each node's Consul and its clients other certificates, and
// restarts who does not read them again by itself: Nomad.
func (p *production) replaceCertificates() {
	for _, n := range slices.Backward(p.nodes()) {
		n.IssueCertificates()
		n.ReloadConsul()
		n.Nomad.Restart(p.t)
	}
	p.leader.Server.Restart(p.t)
	rollingUpdate(p.t, &p.cluster)
	p.content()
}
