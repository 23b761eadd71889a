// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// meshAlone lets Envoy send nothing to what the mesh does not know: an answer from
// there went past the proxy.
func meshAlone(n *nomad.Node) {
	n.ConfigEntry(map[string]any{"Kind": "mesh", "TransparentProxy": map[string]any{"MeshDestinationsOnly": true}})
}

// wantReply fails where an allocation did not answer.
func wantReply(t *testing.T, got wire.Outcome, a *nomad.Alloc) {
	t.Helper()
	if got.Reply == nil || got.Reply.Alloc != a.ID {
		t.Errorf("got %s, want an answer of %s", got, a.ID)
	}
}

// askUDP sends a datagram from one of the node's namespaces.
func askUDP(from *test.NetNS, address string) (got wire.Outcome) {
	from.Do(func() {
		conn, err := net.Dial("udp", address)
		if err != nil {
			got = got.Fail(err)
			return
		}
		defer conn.Close()
		answer := make([]byte, 2048)
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second)) // Read tells
		if _, err = conn.Write([]byte("?")); err == nil {
			var n int
			if n, err = conn.Read(answer); err == nil {
				got = got.Told(answer[:n])
				return
			}
		}
		got = got.Fail(err)
	})
	return got
}

// wantWorkload waits until Weir shows an allocation as it should be, without
// problems.
func wantWorkload(a *nomad.Alloc, mode, guard string) nomad.Workload {
	return a.EventuallyWorkload(fmt.Sprintf("%s, guard %s", mode, guard), func(w nomad.Workload) bool {
		return w.Mode == mode && w.Guard == guard && w.Proxy.Identity == "cgroup" && len(w.Problems) == 0
	})
}

// cniWeirDocker runs Docker's jobs on the network that deploy/weir.conflist names.
func cniWeirDocker(t *testing.T, n *nomad.Node) {
	meshAlone(n)
	serveNeighbour(t, n, ":80")
	speaksHTTP(n, "cniweir-api")
	job := n.Run("testdata/jobs/cniweir-docker.nomad.hcl")
	api, shop, web := job.Alloc("api"), job.Alloc("shop"), job.Alloc("web")

	t.Run("Network", func(t *testing.T) {
		for _, a := range job.Allocs() {
			w := a.Workload()
			if len(w.Addresses) == 0 || !strings.HasPrefix(w.Addresses[0], "172.26.") {
				t.Errorf("group %s has addresses %q, want one of 172.26.96.0/20", a.Group, w.Addresses)
			}
		}
		if rules := n.Command("nft", "list", "table", "inet", "weir"); !strings.Contains(rules, "172.26.96.0/20") {
			t.Errorf("rules are %s, want the masquerading of 172.26.96.0/20", rules)
		}
		out, err := n.Try("iptables", "-t", "nat", "-S")
		for _, a := range job.Allocs() {
			if err == nil && strings.Contains(out, a.ID) {
				t.Errorf("iptables has rules of %s: %s", a.Group, out)
			}
		}
	})

	t.Run("Transparent", func(t *testing.T) {
		const url = "http://cniweir-api.virtual.consul/"
		shop.EventuallyGet("shop", url, nil)
		var got wire.Outcome
		grown := counted(shop, func() { got = shop.Get("shop", url) })
		wantMesh(t, got, api, "cniweir-shop")
		wantVirtual(t, got)
		if grown["redirected"] != 1 || grown["dns"] == 0 {
			t.Errorf("the client's verdicts grew by %v, want redirected 1 and dns", grown)
		}
		wantWorkload(api, "transparent", "audit")
	})

	t.Run("Upstream", func(t *testing.T) {
		address := web.Env("web")["NOMAD_UPSTREAM_ADDR_cniweir_api"]
		wantMesh(t, web.EventuallyGet("web", "http://"+address+"/", nil), api, "cniweir-web")
	})

	wantWorkload(web, "direct", "enforce")
	dynamic := web.Env("web")["NOMAD_HOST_PORT_dynamic"]
	t.Run("HostPorts", func(t *testing.T) {
		for port, a := range map[string]*nomad.Alloc{"28081": api, "28083": web, dynamic: web} {
			url := "http://" + net.JoinHostPort(nomad.NodeAddress, port) + "/"
			wantReply(t, n.Get(n.Neighbour(), url), a)
			wantReply(t, n.Get(n.NetNS(), url), a)
			wantReply(t, web.Get("web", url), a) // to another's and to its own
		}
		address := net.JoinHostPort(nomad.NodeAddress, dynamic)
		wantReply(t, askUDP(n.Neighbour(), address), web)
		wantReply(t, web.App("web", "dial", "udp", address), web)
	})

	t.Run("Outside", func(t *testing.T) {
		url := "http://" + nomad.NeighbourAddress + "/"
		if got := web.Get("web", url); got.Reply == nil || !strings.HasPrefix(got.Reply.Remote, nomad.NodeAddress+":") {
			t.Errorf("a plain allocation asks a neighbour of the node: %s, want an answer to the node's address", got)
		}
		for _, forbidden := range []string{url, "http://" + nomad.NodeAddress + ":28081/", "http://" + api.Workload().Addresses[0] + ":8081/"} {
			var got wire.Outcome
			grown := counted(shop, func() { got = shop.Get("shop", forbidden) })
			if got.Reply != nil || grown["redirected"] != 1 {
				t.Errorf("a transparent allocation dials past the mesh, %s: %s, verdicts %v", forbidden, got, grown)
			}
		}
	})

	t.Run("Guarded", func(t *testing.T) {
		var got wire.Outcome
		grown := counted(web, func() { got = n.Get(n.NetNS(), "http://"+web.Workload().Addresses[0]+":8080/") })
		if got.Errno != syscall.ECONNREFUSED || grown["refused_guard"] == 0 {
			t.Errorf("the node asks the application of a plain job: %s, verdicts %v; want refused_guard", got, grown)
		}
		grown = counted(api, func() { got = n.Get(n.NetNS(), "http://"+api.Workload().Addresses[0]+":8080/") })
		if got.Reply != nil || grown["inbound"] == 0 {
			t.Errorf("the node asks the application of a transparent job: %s, verdicts %v; want inbound, and no answer of Envoy's", got, grown)
		}
	})
}

// operatorAllows is the operator's word for arguments of jobs, until the test ends.
func operatorAllows(t *testing.T, n *nomad.Node, names ...string) {
	list, err := json.Marshal(names)
	if err != nil {
		t.Fatal(err)
	}
	const file = "/etc/weir.d/operator.hcl"
	n.Write(file, "cni {\n  job_args = "+string(list)+"\n}\n", 0o600)
	t.Cleanup(func() {
		if err := os.Remove(n.Path(file)); err != nil {
			t.Error(err)
		}
	})
}

// transparentByDefaults makes Consul give services a transparent proxy, whose
// outbound listener has that port.
func transparentByDefaults(n *nomad.Node, ports map[string]int) {
	for service, port := range ports {
		n.ConfigEntry(map[string]any{
			"Kind": "service-defaults", "Name": service, "Protocol": "http", "Mode": "transparent",
			"TransparentProxy": map[string]any{"OutboundListenerPort": port},
		})
	}
}

// cniWeirArgs asks for the redirect by the job's own arguments, with exec.
func cniWeirArgs(t *testing.T, n *nomad.Node) {
	t.Run("Refused", func(t *testing.T) {
		n := n.For(t)
		job := n.Submit("testdata/jobs/cniweir-refused.nomad.hcl")
		var id, told string
		test.Eventually(t, func() error {
			for _, a := range job.Allocs() {
				id, told = a.ID, a.Events()
			}
			if !strings.Contains(told, "Setup Failure") {
				return fmt.Errorf("events are %q", told)
			}
			return nil
		}, "the allocation to fail")
		for _, want := range []string{"weir.exclude-outbound-ports: the operator of this node does not let a job set it", "allocation " + id} {
			if !strings.Contains(told, want) {
				t.Errorf("Nomad's events are\n%swant %q in them", told, want)
			}
		}
	})

	meshAlone(n)
	operatorAllows(t, n, "mode", "guard", "inbound-port", "dns", "exclude-outbound-ports", "exclude-outbound-cidrs", "proxy-uid", "exclude-uids")
	transparentByDefaults(n, map[string]int{"cniweir-server": 15001, "cniweir-client": 15001})
	serveNeighbour(t, n, ":80", ":9099")
	lan := n.AddNeighbourAddress("10.99.0.4")
	job := n.Run("testdata/jobs/cniweir-args.nomad.hcl")
	server, client := job.Alloc("server"), job.Alloc("client")

	const url = "http://cniweir-server.virtual.consul/"
	client.EventuallyGet("client", url, nil)
	var got wire.Outcome
	grown := counted(client, func() { got = client.Get("client", url) })
	wantMesh(t, got, server, "cniweir-client")
	wantVirtual(t, got)
	if grown["redirected"] != 1 || grown["dns"] == 0 {
		t.Errorf("verdicts grew by %v, want redirected 1 and dns", grown)
	}

	t.Run("InboundPort", func(t *testing.T) {
		// What the plugin recorded, which is what Nomad gave it for the variable.
		want := server.Env("server")["NOMAD_PORT_connect_proxy_cniweir_server"]
		var record struct {
			Request struct {
				InboundPort json.Number `json:"inbound_port"`
			} `json:"request"`
		}
		text := n.Command("cat", "/run/weir/workloads/"+server.ID+"-eth0.json")
		if err := json.Unmarshal([]byte(text), &record); err != nil {
			t.Fatal(err)
		}
		if record.Request.InboundPort.String() != want || want == "" {
			t.Errorf("the request has inbound port %q, want %q: %s", record.Request.InboundPort, want, text)
		}
		wantWorkload(server, "transparent", "enforce")
	})

	for _, each := range []struct {
		name, task, url, verdict string
		out                      bool
	}{
		{"Excluded port", "client", "http://" + nomad.NeighbourAddress + ":9099/", "port_excluded", true},
		{"Excluded CIDR", "client", "http://" + lan + "/", "cidr_excluded", true},
		{"Excluded UID", "nightly", "http://" + nomad.NeighbourAddress + "/", "uid_excluded", true},
		{"Not excluded", "client", "http://" + nomad.NeighbourAddress + "/", "redirected", false},
	} {
		t.Run(each.name, func(t *testing.T) {
			grown := counted(client, func() { got = client.Get(each.task, each.url) })
			if (got.Reply != nil) != each.out || grown[each.verdict] != 1 {
				t.Errorf("got %s, verdicts %v, want an answer from outside: %v, and %s 1", got, grown, each.out, each.verdict)
			}
		})
	}
	if w := wantWorkload(client, "transparent", "audit"); w.Proxy.UID != 65637 {
		t.Errorf("the proxy is one of UID %d, want 65637", w.Proxy.UID)
	}
	if notes := client.Workload().Notes; !slices.ContainsFunc(notes, func(note string) bool { return strings.Contains(note, "backup@9099") }) {
		t.Errorf("notes are %q, want the name of the exclusion", notes)
	}
}

// cniWeirSix has both families: what may leave does, and nothing passes the mesh.
func cniWeirSix(t *testing.T, n *nomad.Node) {
	meshAlone(n)
	serveNeighbour(t, n, ":80")
	speaksHTTP(n, "cniweir-closed")
	job := n.Run("testdata/jobs/cniweir-six.nomad.hcl")
	plain, closed := job.Alloc("plain"), job.Alloc("closed")
	six := func(a *nomad.Alloc) string {
		for _, address := range a.Workload().Addresses {
			if strings.HasPrefix(address, "fd00:77:") {
				return address
			}
		}
		t.Fatalf("group %s has addresses %q, want one of fd00:77::/64", a.Group, a.Workload().Addresses)
		return ""
	}
	wantMesh(t, plain.EventuallyGet("plain", "http://127.0.0.1:9191/", nil), closed, "cniweir-plain")

	const outside = "http://[fd00:99::1]/"
	if got := plain.Get("plain", outside); got.Reply == nil || !strings.HasPrefix(got.Reply.Remote, "["+nomad.NodeAddress6+"]:") {
		t.Errorf("a plain allocation asks by IPv6: %s, want an answer to the node's address", got)
	}
	wantReply(t, n.Get(n.NetNS(), "http://["+six(plain)+"]:8080/"), plain)

	var got wire.Outcome
	grown := counted(closed, func() { got = closed.Get("closed", outside) })
	if got.Reply != nil || grown["redirected"]+grown["refused_family"] != 1 {
		t.Errorf("a transparent allocation asks by IPv6: %s, verdicts %v; want it redirected or refused", got, grown)
	}
	grown = counted(closed, func() { got = n.Get(n.NetNS(), "http://["+six(closed)+"]:8080/") })
	if got.Reply != nil || grown["inbound"]+grown["refused_inbound_no_proxy"] == 0 {
		t.Errorf("the node asks the application by IPv6: %s, verdicts %v; want no answer of it", got, grown)
	}
}

// cniWeirPair has two plain sidecars in a group: each speaks for its own service.
func cniWeirPair(t *testing.T, n *nomad.Node) {
	speaksHTTP(n, "cniweir-left", "cniweir-right", "cniweir-caller")
	job := n.Run("testdata/jobs/cniweir-pair.nomad.hcl")
	pair, caller := job.Alloc("pair"), job.Alloc("caller")
	wantWorkload(pair, "direct", "enforce")
	for _, each := range []struct{ service, port, upstream string }{
		{"cniweir-left", "8081", "9191"},
		{"cniweir-right", "8082", "9192"},
	} {
		got := caller.EventuallyGet("caller", "http://127.0.0.1:"+each.upstream+"/", nil)
		wantMesh(t, got, pair, "cniweir-caller")
		if !strings.HasSuffix(got.Reply.Local, ":"+each.port) {
			t.Errorf("%s was asked at %s, want port %s", each.service, got.Reply.Local, each.port)
		}
		wantMesh(t, pair.EventuallyGet("pair", "http://127.0.0.1:"+each.upstream+"/", nil), caller, each.service)

		grown := counted(pair, func() { got = n.Get(n.NetNS(), "http://"+pair.Workload().Addresses[0]+":"+each.port+"/") })
		if got.Errno != syscall.ECONNREFUSED || grown["refused_guard"] == 0 {
			t.Errorf("the node asks the application of %s: %s, verdicts %v; want refused_guard", each.service, got, grown)
		}
	}
}

// cniWeirTwo has two transparent sidecars in a group: the one that an intention
// names speaks, and each takes in what is for its own service.
func cniWeirTwo(t *testing.T, n *nomad.Node) {
	meshAlone(n)
	operatorAllows(t, n, "mode", "inbound-port", "dns")
	transparentByDefaults(n, map[string]int{"cniweir-first": 15001, "cniweir-second": 15002})
	speaksHTTP(n, "cniweir-other")
	serveNeighbour(t, n, ":80")
	n.Intend("cniweir-second", "cniweir-other", "allow")
	job := n.Run("testdata/jobs/cniweir-two.nomad.hcl")
	two, other := job.Alloc("two"), job.Alloc("other")

	for service, port := range map[string]string{"first": "8081", "second": "8082"} {
		upstream := other.Env("other")["NOMAD_UPSTREAM_ADDR_cniweir_"+service]
		got := other.EventuallyGet("other", "http://"+upstream+"/", nil)
		wantMesh(t, got, two, "cniweir-other")
		if !strings.HasSuffix(got.Reply.Local, ":"+port) {
			t.Errorf("%s was asked at %s, want port %s", service, got.Reply.Local, port)
		}
		// Nobody reaches the application itself.
		got = wire.Outcome{}
		grown := counted(two, func() { got = n.Get(n.NetNS(), "http://"+two.Workload().Addresses[0]+":"+port+"/") })
		if got.Status == http.StatusOK || grown["inbound"] == 0 {
			t.Errorf("the node asks the application of %s: %s, verdicts %v; want inbound, and no answer", service, got, grown)
		}
	}

	const url = "http://cniweir-other.virtual.consul/"
	var got wire.Outcome
	two.EventuallyGet("two", url, func(tried wire.Outcome) error {
		got = tried
		if got.Reply == nil || !strings.Contains(got.Reply.ClientCert, "/svc/cniweir-second") {
			return fmt.Errorf("got %s, want it to be asked by cniweir-second", got)
		}
		return nil
	})
	wantMesh(t, got, other, "cniweir-second")
	wantVirtual(t, got)
	grown := counted(two, func() { got = two.Get("two", "http://"+nomad.NeighbourAddress+"/") })
	if got.Reply != nil || grown["redirected"] != 1 {
		t.Errorf("it dials past the mesh: %s, verdicts %v", got, grown)
	}
}
