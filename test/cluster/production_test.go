// SPDX-License-Identifier: MPL-2.0

package cluster

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

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
	p := newProduction(t, nomad.Start(t, secure()))
	c := &p.cluster
	for range 3 {
		c.members = append(c.members, c.leader.Join(secure()))
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
	p.play([]scene{
		{name: "rolling update", run: rollingUpdate},
		{name: "tokens replaced", run: func(*testing.T, *cluster) { p.replaceTokens() }},
		{name: "certificates replaced", run: func(*testing.T, *cluster) { p.replaceCertificates() }},
		{name: "the mesh's CA replaced", run: func(t *testing.T, c *cluster) {
			replaceMeshCA(t, c.leader, append(proxies(c.job, "server", "cluster-server"),
				proxy{c.job.Alloc("transparent"), services[1]}, proxy{c.job.Alloc("plain"), services[2]}))
		}},
		{name: "a foreign registration", run: func(*testing.T, *cluster) { p.claimed() }},
		{name: "node drain", run: drain},
		{name: "Consul's clients", run: func(t *testing.T, c *cluster) { c.each(t, c.members, consulOf) }},
		{name: "Nomad's clients", run: func(t *testing.T, c *cluster) { c.each(t, c.nodes(), clientOf) }},
	})
	p.content()
	p.guarded()
}

// secure are nodes as production runs them.
func secure() nomad.Options {
	return nomad.Options{NoDocker: true, Secure: true, Agent: gate + nomad.SecureAgent + "guard {\n  default = \"enforce\"\n}\n"}
}

// play plays scenes in which no request may be lost, but where they say why.
func (p *production) play(scenes []scene) {
	p.t.Helper()
	for _, s := range scenes {
		began, before := time.Now(), p.counts()
		s.run(p.t, &p.cluster)
		p.answered()
		for i, each := range p.clients {
			told := each.tally(before[i])
			p.t.Logf("%s: %s: %s: %d requests, %d lost", time.Since(began).Round(time.Second), s.name, each.group, told.asked, told.lost)
			if told.wrong > 0 || told.lost > 0 && s.lossy == "" || told.lost > told.asked/2 {
				p.t.Errorf("%s: %s: %d of %d requests lost, %d wrong; the first: %s, the last: %s",
					s.name, each.group, told.lost, told.asked, told.wrong, told.first, told.last)
			}
		}
	}
}

// production is a cluster whose agents have tokens.
type production struct {
	cluster

	t         *testing.T
	accessors map[*nomad.Node]string // of the tokens that the agents have
	tokens    int                    // made so far
	peers     bool                   // its jobs have upstreams of a peer
}

func newProduction(t *testing.T, leader *nomad.Node) *production {
	return &production{t: t, cluster: cluster{leader: leader}, accessors: make(map[*nomad.Node]string)}
}

// giveToken gives a node's agent a new token with the documented policy.
func (p *production) giveToken(n *nomad.Node) {
	p.t.Helper()
	p.tokens++
	secret := fmt.Sprintf("8e3b0b4c-7d0a-4a52-9d3e-2f3a6f4c9b%02d", p.tokens)
	rules := strings.ReplaceAll(consul.DocumentedPolicy(p.t), `"node"`, `"`+n.Name()+`"`)
	if p.peers { // as docs/install.md says
		rules = strings.ReplaceAll(rules, `node "`+n.Name()+`"`, `node_prefix ""`)
	}
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

// claimed: who registers a proxy of his own in the name of an instance changes nothing
// there, and is told.
func (p *production) claimed() {
	p.t.Helper()
	n := p.fill(p.t, p.members[0])
	var id string
	for alloc, node := range p.servers() {
		if node == n.Name() {
			id = fmt.Sprintf("_nomad-task-%s-group-server-evil-8080-sidecar-proxy", alloc)
		}
	}
	n.ConsulPut("/v1/agent/service/register", map[string]any{
		"Kind": "connect-proxy", "ID": id, "Name": "evil-sidecar-proxy", "Port": 8080, "Proxy": map[string]any{
			"DestinationServiceName": "evil", "Expose": map[string]any{"Paths": []any{map[string]any{"ListenerPort": 8080, "LocalPathPort": 8080, "Path": "/"}}},
		}})
	test.EventuallyIn(p.t, patience, func() error {
		var status struct{ Problems []health.Problem }
		if err := n.Weir(&status, "status", "-json"); err != nil {
			return err
		}
		for _, problem := range status.Problems {
			if problem.Code == health.ProblemForeignRegistration.String() && strings.Contains(problem.Subject, id) {
				return nil
			}
		}
		return fmt.Errorf("problems are %+v", status.Problems)
	}, "the registration to be told as foreign")
	p.guarded()
	n.ConsulPut("/v1/agent/service/deregister/"+id, nil)
	p.content()
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
