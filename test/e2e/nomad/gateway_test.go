// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
	"github.com/weirmesh/weir/test/spawn"
)

// The allocations' subnets, in Nomad's bridge mode and of deploy/weir.conflist.
const (
	allocations4      = "172.26.64.0/20"
	allocationsOfCNI4 = "172.26.96.0/20"
)

// gateways runs the gateways that Nomad injects, in bridge mode and on the node's own
// network.
func gateways(t *testing.T, n *nomad.Node) {
	api := gatewaysIn(t, n, "gw", "bridge", "9080", allocations4)

	t.Run("HostNetwork", func(t *testing.T) {
		n := n.For(t)
		n.DropConfigEntry("ingress-gateway", "gw-host")
		host := n.Run("testdata/jobs/gateway-host.nomad.hcl").Alloc("host")
		var got wire.Outcome
		test.Eventually(t, func() error {
			got = n.Get(n.Neighbour(), "http://"+nomad.NodeAddress+":9081/")
			return wantOK(got)
		}, "the gateway on the node's own network to answer")
		wantMesh(t, got, api, "gw-host")
		w := host.EventuallyWorkload("the agent to know it", func(w nomad.Workload) bool { return w.Agent != nil })
		if w.Agent.State != "host" || len(w.Agent.Problems) > 0 || w.Mode != "" || w.NetNS != "" {
			t.Errorf("the agent has it as %+v, want a gateway on the node's own network, without problems or a namespace", w)
		}
		var status struct {
			Problems []string
			Agent    struct{ Workloads map[string]int }
		}
		if err := n.Weir(&status, "status", "-json"); err != nil || status.Agent.Workloads["host"] != 1 || status.Agent.Workloads["unprotected"] != 0 {
			t.Errorf("weir status has %+v, %v; want one on the node's own network and none unprotected", status, err)
		}
		test.Eventually(t, func() error {
			out, err := n.Try("weir", "status")
			if err == nil && !strings.Contains(out, "1 gateway on the node's own network") {
				err = errors.New("it does not tell the gateway")
			}
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		}, "weir status to be content")
	})
}

// cniWeirGateways runs them on the network that the plugin builds.
func cniWeirGateways(t *testing.T, n *nomad.Node) {
	gatewaysIn(t, n, "cgw", "cni/weir", "9082", allocationsOfCNI4)
}

// gatewaysIn runs a gateway of each kind in a network mode, each of which asks for the
// guard, and returns the service behind them.
func gatewaysIn(t *testing.T, n *nomad.Node, id, mode, door, subnet string) *nomad.Alloc {
	speaksHTTP(n, id+"-api")
	n.DropConfigEntry("ingress-gateway", id+"-ingress")
	n.DropConfigEntry("terminating-gateway", id+"-exit")
	serveNeighbour(t, n, nomad.NeighbourAddress+":7070")
	n.RouteNeighbour(subnet)
	n.ConsulPut("/v1/catalog/register", map[string]any{
		"Node": "outside", "Address": nomad.NeighbourAddress, "Service": map[string]any{"Service": id + "-legacy", "Port": 7070},
	})
	t.Cleanup(func() { n.ConsulPut("/v1/catalog/deregister", map[string]any{"Node": "outside"}) })
	job := n.Run("testdata/jobs/gateways.nomad.hcl", "id", id, "mode", mode, "door", door)
	api, web, ingress, exit, mesh := job.Alloc("api"), job.Alloc("web"), job.Alloc("ingress"), job.Alloc("exit"), job.Alloc("mesh")

	t.Run("Ingress", func(t *testing.T) {
		wantGateway(t, ingress)
		for _, url := range []string{"http://" + nomad.NodeAddress + ":" + door + "/", "http://" + ingress.Workload().Addresses[0] + ":" + door + "/"} {
			var got wire.Outcome
			test.Eventually(t, func() error {
				got = n.Get(n.Neighbour(), url)
				return wantOK(got)
			}, "GET "+url+" from the neighbour")
			wantMesh(t, got, api, id+"-ingress")
		}
		wantGuarded(t, n, ingress, web)
	})

	t.Run("Terminating", func(t *testing.T) {
		wantGateway(t, exit)
		task, stat := "connect-terminating-"+id+"-exit", "cluster."+id+"-legacy..*upstream_cx_total"
		url := "http://" + web.Env("web")["NOMAD_UPSTREAM_ADDR_"+id+"_legacy"] + "/"
		web.EventuallyGet("web", url, nil)
		before := exit.EnvoyStat(task, id+"-exit", stat)
		got := web.Get("web", url)
		if got.Reply == nil || got.Reply.Task != "neighbour" || !strings.HasPrefix(got.Reply.Remote, nomad.NodeAddress+":") {
			t.Errorf("got %s, want an answer of the neighbour", got)
		}
		if after := exit.EnvoyStat(task, id+"-exit", stat); after != before+1 {
			t.Errorf("connections of the gateway to the service: %d, then %d, want one more", before, after)
		}
		// Its administration is bound to every address.
		if got := exit.Get(task, fmt.Sprintf("http://%s:19000/ready", exit.Workload().Addresses[0])); got.Status != 200 {
			t.Errorf("the gateway's administration from inside: %s, want 200", got)
		}
		wantGuarded(t, n, exit, web)
	})

	t.Run("Mesh", func(t *testing.T) {
		wantGateway(t, mesh)
		for _, label := range []string{"wan", "connect-mesh-" + id + "-mesh-lan"} {
			port, _ := mesh.Port(label)
			client := peer(t, n, id+"-web", id+"-api")
			var got wire.Outcome
			test.Eventually(t, func() error {
				got = askPeer(client, fmt.Sprintf("https://%s:%d/", nomad.NodeAddress, port))
				return wantOK(got)
			}, label+" of the mesh gateway to pass a connection on")
			wantMesh(t, got, api, id+"-web")
		}
		wantGuarded(t, n, mesh, web)
	})
	return api
}

// apiGateways runs the gateway that Nomad has no block for, in both modes, on a node
// whose own word is to guard. Its task asks Consul by the network.
func apiGateways(t *testing.T, n *nomad.Node, server, neighbour *nomad.Alloc, service string) {
	const both = "127.0.0.1 " + nomad.NodeAddress
	n.Write("/etc/consul.d/network.hcl", fmt.Sprintf("addresses {\n  http = %q\n  grpc = %q\n}\n", both, both), 0o600)
	n.Consul.Restart(t)
	n.RouteNeighbour(allocationsOfCNI4)
	for _, each := range []struct {
		name, id, mode string
		door           int
	}{{"Bridge", "gw-http", "bridge", 9701}, {"CNIWeir", "cgw-http", "cni/weir", 9702}} {
		t.Run(each.name, func(t *testing.T) {
			n := n.For(t)
			n.ConfigEntry(map[string]any{"Kind": "api-gateway", "Name": each.id, "Listeners": []any{
				map[string]any{"Name": "http", "Port": each.door, "Protocol": "http"}}})
			n.ConfigEntry(map[string]any{"Kind": "http-route", "Name": each.id,
				"Parents": []any{map[string]any{"Kind": "api-gateway", "Name": each.id}},
				"Rules":   []any{map[string]any{"Services": []any{map[string]any{"Name": service}}}}})
			a := n.Run("testdata/jobs/gateway-api.nomad.hcl", "id", each.id, "mode", each.mode, "door", fmt.Sprint(each.door)).Alloc("gateway")
			wantGateway(t, a)
			var got wire.Outcome
			test.Eventually(t, func() error {
				got = n.Get(n.Neighbour(), fmt.Sprintf("http://%s:%d/", nomad.NodeAddress, each.door))
				return wantOK(got)
			}, "the API gateway to answer")
			wantMesh(t, got, server, each.id)
			admin := fmt.Sprintf("http://%s:19000/ready", address(t, a, netip.Addr.Is4))
			inside := &test.NetNS{Path: n.Path("/run/netns/" + a.ID)}
			if got := n.Get(inside, admin); got.Status != 200 {
				t.Errorf("the gateway's administration from inside: %s, want 200", got)
			}
			wantRefused(t, n, a, neighbour, admin)
		})
	}
}

// wantOK is an error where no task answered.
func wantOK(got wire.Outcome) error {
	if !got.OK() || got.Reply == nil {
		return fmt.Errorf("got %s", got)
	}
	return nil
}

// wantGateway waits until the agent knows an allocation for a gateway whose job
// asks for the guard.
func wantGateway(t *testing.T, a *nomad.Alloc) {
	t.Helper()
	// Its rows are in the kernel some moments before the pass of the agent ends that wrote them.
	w := a.EventuallyWorkload("the guard of "+a.Group, func(w nomad.Workload) bool { return w.Guard == "enforce" && w.Agent != nil })
	if w.Mode != "gateway" || len(w.Problems) > 0 || len(w.Agent.Problems) > 0 {
		t.Errorf("workload of %s is %+v, want a gateway without problems", a.Group, w)
	}
}

// wantGuarded fails where somebody outside reaches Envoy's administration, or any
// port but a listener's.
func wantGuarded(t *testing.T, n *nomad.Node, a, neighbour *nomad.Alloc) {
	t.Helper()
	for _, port := range []int{19000, 19001, 8080} {
		wantRefused(t, n, a, neighbour, fmt.Sprintf("http://%s:%d/ready", a.Workload().Addresses[0], port))
	}
}

// wantRefused asks from the node, from a neighbour on the bridge and from one on
// the node's network, and fails where the guard does not refuse.
func wantRefused(t *testing.T, n *nomad.Node, a, neighbour *nomad.Alloc, url string) {
	t.Helper()
	for from, got := range fromOutside(n, neighbour, url) {
		var outcome wire.Outcome
		grown := counted(a, func() { outcome = got() })
		if outcome.Errno != syscall.ECONNREFUSED || grown["refused_guard"] != 1 {
			t.Errorf("GET %s from %s: %s, verdicts grew by %v; want a refusal by the guard", url, from, outcome, grown)
		}
	}
}

// fromOutside are the places outside an allocation, and how to ask from there.
func fromOutside(n *nomad.Node, neighbour *nomad.Alloc, url string) map[string]func() wire.Outcome {
	return map[string]func() wire.Outcome{
		"the node":                      func() wire.Outcome { return n.Get(n.NetNS(), url) },
		"a neighbour on the bridge":     func() wire.Outcome { return neighbour.Get(neighbour.Group, url) },
		"a machine on the same network": func() wire.Outcome { return n.Get(n.Neighbour(), url) },
	}
}

// peer is an HTTP client on the neighbour that speaks as the proxy of a service in
// another datacenter does: with its own certificate, and with trust in nobody but
// the service that it asks for.
func peer(t *testing.T, n *nomad.Node, source, target string) *http.Client {
	t.Helper()
	var roots struct {
		TrustDomain string
		Roots       []struct{ RootCert string }
	}
	n.ConsulGet("/v1/agent/connect/ca/roots", &roots)
	pool := x509.NewCertPool()
	for _, root := range roots.Roots {
		pool.AppendCertsFromPEM([]byte(root.RootCert))
	}
	var leaf struct{ CertPEM, PrivateKeyPEM string }
	n.ConsulGet("/v1/agent/connect/ca/leaf/"+source, &leaf)
	certificate, err := tls.X509KeyPair([]byte(leaf.CertPEM), []byte(leaf.PrivateKeyPEM))
	if err != nil {
		t.Fatalf("read certificate of %s: %v", source, err)
	}
	config := &tls.Config{
		ServerName: target + ".default.dc1.internal." + roots.TrustDomain, Certificates: []tls.Certificate{certificate},
		InsecureSkipVerify: true, // the name is no DNS name: VerifyConnection looks at it
		VerifyConnection: func(state tls.ConnectionState) error {
			other := state.PeerCertificates[0]
			if _, err := other.Verify(x509.VerifyOptions{Roots: pool}); err != nil {
				return err
			}
			if len(other.URIs) != 1 || !strings.HasSuffix(other.URIs[0].Path, "/svc/"+target) {
				return fmt.Errorf("the other end is %v, want service %s", other.URIs, target)
			}
			return nil
		},
	}
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: config, DialContext: spawn.Dialer(n.Neighbour().Path),
	}}
}

func askPeer(client *http.Client, url string) (outcome wire.Outcome) {
	response, err := client.Get(url)
	if err != nil {
		return outcome.Fail(err)
	}
	defer response.Body.Close()
	outcome.Status = response.StatusCode
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return outcome.Fail(err)
	}
	return outcome.Told(text)
}
