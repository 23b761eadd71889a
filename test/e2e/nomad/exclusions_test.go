// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// serveNeighbour answers HTTP at addresses of the node's neighbour.
func serveNeighbour(t *testing.T, n *nomad.Node, addresses ...string) {
	t.Helper()
	for _, address := range addresses {
		var listener net.Listener
		var err error
		n.Neighbour().Do(func() { listener, err = net.Listen("tcp", address) })
		if err != nil {
			t.Fatal(err)
		}
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
			_ = json.NewEncoder(w).Encode(wire.Reply{Task: "neighbour", Remote: r.RemoteAddr, Local: local.String()})
		})}
		go func() { _ = server.Serve(listener) }() // until it is closed
		t.Cleanup(func() { server.Close() })
	}
}

// exclusions runs a job that names each kind of exclusion. The mesh lets nothing
// out that it does not know: what is answered from outside went past the proxy.
func exclusions(t *testing.T, n *nomad.Node) {
	n.ConfigEntry(map[string]any{"Kind": "mesh", "TransparentProxy": map[string]any{"MeshDestinationsOnly": true}})
	serveNeighbour(t, n, ":80", ":9099")
	other := n.AddNeighbourAddress("10.99.0.3")
	speaksHTTP(n, "excl-server")
	job := n.Run("testdata/jobs/exclusions.nomad.hcl")
	client, server := job.Alloc("client"), job.Alloc("server")

	t.Run("CustomSidecarPort", func(t *testing.T) {
		wantMesh(t, client.EventuallyGet("client", "http://excl-server.virtual.consul/", nil), server, "excl-client")
		if got := server.Workload().Proxy.Inbound; got != 20999 {
			t.Errorf("inbound port is %d, want 20999", got)
		}
	})

	for _, each := range []struct {
		name, verdict string
		args          []string
		out           bool
	}{
		{"NotExcluded", "redirected", []string{"get", "http://" + other + "/"}, false},
		{"CIDR", "cidr_excluded", []string{"get", "http://" + nomad.NeighbourAddress + "/"}, true},
		{"Port", "port_excluded", []string{"get", "http://" + other + ":9099/"}, true},
		{"UID", "uid_excluded", []string{"-uid", "1234", "get", "http://" + other + "/"}, true},
		{"OtherUID", "redirected", []string{"-uid", "1235", "get", "http://" + other + "/"}, false},
		{"EnvoyUID", "redirected", []string{"-uid", "101", "get", "http://" + other + "/"}, false},
	} {
		t.Run("Outbound"+each.name, func(t *testing.T) {
			var got wire.Outcome
			grown := counted(client, func() { got = client.App("client", each.args...) })
			if answered := got.Reply != nil && got.Reply.Task == "neighbour"; answered != each.out {
				t.Errorf("got %s, want an answer from outside: %v", got, each.out)
			}
			if grown[each.verdict] != 1 {
				t.Errorf("verdicts grew by %v, want %s 1", grown, each.verdict)
			}
		})
	}

	addr := client.Workload().Addresses[0]
	for _, each := range []struct {
		name, url string
		in        bool
	}{
		{"NotExcluded", "http://" + addr + ":8080/", false},
		{"Label", "http://" + addr + ":9102/", true},
		{"LabelByHostPort", "http://" + nomad.NodeAddress + ":9102/", true},
		{"StaticPort", "http://" + nomad.NodeAddress + ":9103/", true},
		{"StaticPortWithoutTo", "http://" + nomad.NodeAddress + ":9104/", true},
		{"Number", "http://" + addr + ":9105/", true},
	} {
		t.Run("Inbound"+each.name, func(t *testing.T) {
			from := n.NetNS()
			if strings.Contains(each.url, nomad.NodeAddress) {
				from = n.Neighbour()
			}
			var got wire.Outcome
			grown := counted(client, func() { got = n.Get(from, each.url) })
			if answered := got.Reply != nil && got.Reply.Alloc == client.ID; answered != each.in {
				t.Errorf("got %s, want an answer of the application: %v", got, each.in)
			}
			verdict := map[bool]string{true: "inbound_excluded", false: "inbound"}[each.in]
			if grown[verdict] == 0 {
				t.Errorf("verdicts grew by %v, want %s", grown, verdict)
			}
		})
	}

	t.Run("Neighbours", func(t *testing.T) {
		// Another allocation on the bridge is as much outside as the node is.
		got := server.Get("server", fmt.Sprintf("http://%s:8080/", addr))
		if got.Reply != nil {
			t.Errorf("a neighbour on the bridge reached the application: %s", got)
		}
	})

	// What TestNode looks for at its end must be there now.
	left := fmt.Sprint(n.Leftovers())
	for _, what := range []string{
		"network namespace of Docker: ", "interface: veth", "rule: ", "IP lease: ", "CNI result: ",
		"pinned program: ", "record: ", "workloads: ", "process ", "cgroup: ",
	} {
		if !strings.Contains(left, what) {
			t.Errorf("leftovers of a running job do not name its %q: %s", what, left)
		}
	}
}
