// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// forwardDNS makes port 53 of the node lead to Consul, as HashiCorp's guides have
// it for those who resolve by Consul without transparent proxies.
func forwardDNS(n *nomad.Node) {
	for _, protocol := range []string{"udp", "tcp"} {
		n.Command("iptables", "-t", "nat", "-A", "PREROUTING", "-d", nomad.NodeAddress, "-p", protocol, "--dport", "53", "-j", "DNAT", "--to-destination", nomad.NodeAddress+":8600")
	}
}

// guardedUpstreams runs plain connect jobs: explicit upstreams, and the guard of
// services whose tasks listen on every address.
func guardedUpstreams(t *testing.T, n *nomad.Node) {
	forwardDNS(n)
	n.RouteNeighbour(allocations4)
	speaksHTTP(n, "guard-audit", "guard-enforce")
	job := n.Run("testdata/jobs/guard-upstreams.nomad.hcl")
	client, servers := job.Alloc("client"), map[string]*nomad.Alloc{"audit": job.Alloc("audit"), "enforce": job.Alloc("enforce")}
	for guard, server := range servers {
		w := server.EventuallyWorkload("the guard of "+guard, func(w nomad.Workload) bool { return w.Guard == guard })
		if w.Mode != "direct" || len(w.Problems) > 0 {
			t.Errorf("workload of %s is %+v, want direct, no problems", guard, w)
		}
	}

	for guard, port := range map[string]string{"audit": "9401", "enforce": "9402"} {
		t.Run("Upstream/"+guard, func(t *testing.T) {
			service, server := "guard-"+guard, servers[guard]
			address := client.Env("client")["NOMAD_UPSTREAM_ADDR_guard_"+guard]
			if address != "127.0.0.1:"+port {
				t.Errorf("NOMAD_UPSTREAM_ADDR of %s is %q, want 127.0.0.1:%s", service, address, port)
			}
			client.EventuallyGet("client", "http://"+address+"/", nil)
			requests := func() uint64 {
				return client.EnvoyStat("connect-proxy-guard-client", "guard-client", "cluster."+service+"..*upstream_rq_total")
			}
			name := "http://" + service + ".virtual.consul/"
			got := client.EventuallyGet("client", name, nil) // the agent knows its virtual IP now
			virtual := "http://" + got.To + "/"
			for _, each := range []struct{ url, verdict string }{{"http://" + address + "/", "local"}, {name, "upstream"}, {virtual, "upstream"}} {
				before := requests()
				grown := counted(client, func() { got = client.Get("client", each.url) })
				wantMesh(t, got, server, "guard-client")
				if each.verdict == "upstream" {
					wantVirtualPeer(t, got)
				}
				if grown[each.verdict] != 1 || grown["direct"] != 0 {
					t.Errorf("GET %s: verdicts grew by %v, want %s 1", each.url, grown, each.verdict)
				}
				if after := requests(); after != before+1 {
					t.Errorf("GET %s: requests by the client's proxy: %d, then %d, want one more", each.url, before, after)
				}
			}
		})
	}

	t.Run("Audit", func(t *testing.T) {
		server := servers["audit"]
		url := fmt.Sprintf("http://%s:8080/", server.Workload().Addresses[0])
		for from, get := range fromOutside(n, client, url) {
			var got wire.Outcome
			grown := counted(server, func() { got = get() })
			if got.Reply == nil || got.Reply.Alloc != server.ID || got.Reply.ClientCert != "" || grown["guard_audit"] != 1 {
				t.Errorf("GET %s from %s: %s, verdicts grew by %v; want the task's answer and guard_audit 1", url, from, got, grown)
			}
		}
		wantOpen(t, n, server, client)
	})

	t.Run("Enforce", func(t *testing.T) {
		server := servers["enforce"]
		wantRefused(t, n, server, client, fmt.Sprintf("http://%s:8080/", server.Workload().Addresses[0]))
		wantOpen(t, n, server, client)
		// A check of each kind comes in and goes on passing: the task's, by the
		// exposed path, and that of the proxy's listener.
		comes := server.Verdicts()["inbound_excluded"]
		test.Eventually(t, func() error {
			if got := server.Verdicts()["inbound_excluded"]; got < comes+2 {
				return fmt.Errorf("%d connections came in by open ports, then %d", comes, got)
			}
			return nil
		}, "checks to come in")
		if err := checksOf(n, "guard-enforce"); err != nil {
			t.Error(err)
		}
	})
}

// wantOpen fails where a mapped port or an exposed path of the job cannot be
// reached, by the node's address or the allocation's own.
func wantOpen(t *testing.T, n *nomad.Node, server, neighbour *nomad.Alloc) {
	t.Helper()
	for label, path := range map[string]string{"mapped": "/", "metrics": "/metrics"} {
		host, inside := server.Port(label)
		for _, at := range []string{fmt.Sprintf("%s:%d", nomad.NodeAddress, host), fmt.Sprintf("%s:%d", server.Workload().Addresses[0], inside)} {
			for from, get := range fromOutside(n, neighbour, "http://"+at+path) {
				var got wire.Outcome
				grown := counted(server, func() { got = get() })
				if got.Reply == nil || got.Reply.Alloc != server.ID || grown["guard_audit"]+grown["refused_guard"] != 0 {
					t.Errorf("GET %s%s from %s: %s, verdicts grew by %v; want the task's answer, open to all", at, path, from, got, grown)
				}
				// A mapped port leads to the task itself, an exposed path to Envoy.
				if byEnvoy := got.Reply != nil && strings.HasPrefix(got.Reply.Remote, "127.0.0.1:"); byEnvoy != (label == "metrics") {
					t.Errorf("GET %s%s from %s: %s, want it to come by Envoy: %v", at, path, from, got, label == "metrics")
				}
			}
		}
	}
}

// checksOf is an error where a check of a service or of its proxy does not pass,
// and where there are less than those two.
func checksOf(n *nomad.Node, service string) error {
	var checks map[string]struct{ Name, Status, Output, ServiceName string }
	n.ConsulGet("/v1/agent/checks", &checks)
	var seen int
	var bad []error
	for _, check := range checks {
		if check.ServiceName != service && check.ServiceName != service+"-sidecar-proxy" {
			continue
		}
		seen++
		if check.Status != "passing" {
			bad = append(bad, fmt.Errorf("check %q of %s is %s: %s", check.Name, check.ServiceName, check.Status, check.Output))
		}
	}
	if seen < 2 {
		bad = append(bad, fmt.Errorf("%s has %d checks", service, seen))
	}
	return errors.Join(bad...)
}
