// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

const allocations6 = "fd00:a::/64" // of Nomad's bridge

// listenOnNeighbour accepts connections on the neighbour, and tells who came.
func listenOnNeighbour(t *testing.T, n *nomad.Node, address string) (seen func() []string) {
	t.Helper()
	var listener net.Listener
	var err error
	n.Neighbour().Do(func() { listener, err = net.Listen("tcp", address) })
	if err != nil {
		t.Fatal(err)
	}
	var lock sync.Mutex
	var remotes []string
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			lock.Lock()
			remotes = append(remotes, conn.RemoteAddr().String())
			lock.Unlock()
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		<-done
	})
	return func() []string {
		lock.Lock()
		defer lock.Unlock()
		return slices.Clone(remotes)
	}
}

// outsideResolver answers on the neighbour for the one name outside.example: what
// a resolver of the Internet is to Consul.
func outsideResolver(t *testing.T, n *nomad.Node) {
	t.Helper()
	var conn net.PacketConn
	var err error
	n.Neighbour().Do(func() { conn, err = net.ListenPacket("udp", nomad.NeighbourAddress+":53") })
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buffer := make([]byte, 2048)
		for {
			size, from, err := conn.ReadFrom(buffer)
			if err != nil {
				return
			}
			var query dnsmessage.Message
			if query.Unpack(buffer[:size]) != nil || len(query.Questions) != 1 {
				continue
			}
			query.Response, query.Authoritative, query.Additionals = true, true, nil
			question := query.Questions[0]
			switch {
			case question.Name.String() != "outside.example.":
				query.RCode = dnsmessage.RCodeNameError
			case question.Type == dnsmessage.TypeA:
				query.Answers = []dnsmessage.Resource{{
					Header: dnsmessage.ResourceHeader{Name: question.Name, Type: question.Type, Class: question.Class, TTL: 1},
					Body:   &dnsmessage.AResource{A: [4]byte{192, 0, 2, 7}},
				}}
			}
			if answer, err := query.Pack(); err == nil {
				_, _ = conn.WriteTo(answer, from) // as the network is
			}
		}
	}()
	t.Cleanup(func() {
		conn.Close()
		<-done
	})
}

// TestIPv6 is a node whose allocations have IPv6 addresses, whose Consul resolves
// on one, and which guards every allocation. With consul-cni no transparent_proxy
// job starts here, and IPv6 passes the mesh in and out.
func TestIPv6(t *testing.T) {
	n := nomad.Start(t, nomad.Options{
		Client: fmt.Sprintf("bridge_network_subnet_ipv6 = %q", allocations6), ConsulDNS: nomad.NodeAddress6,
		Consul: fmt.Sprintf("recursors = [%q]", nomad.NeighbourAddress),
		Agent:  "guard {\n  default = \"enforce\"\n}",
	})
	n.RouteNeighbour(allocations4)
	n.RouteNeighbour(allocations6)
	outsideResolver(t, n)
	speaksHTTP(n, "v6-server")
	job := n.Run("testdata/jobs/ipv6-subnet.nomad.hcl")
	client, server, plain := job.Alloc("client"), job.Alloc("server"), job.Alloc("plain")

	const url = "http://v6-server.virtual.consul/"
	client.EventuallyGet("client", url, nil)
	t.Run("DNS", func(t *testing.T) {
		wantMesh(t, client.EventuallyGet("client", url, nil), server, "v6-client")
		own := address(t, server, netip.Addr.Is4)
		for name, want := range map[string]func(string) bool{
			"v6-server.virtual.consul": func(text string) bool { return strings.HasPrefix(text, "240.0.0.") },
			"v6-server.service.consul": func(text string) bool { return text == own || text == nomad.NodeAddress },
			"outside.example":          func(text string) bool { return text == "192.0.2.7" },
		} {
			var got wire.Outcome
			grown := counted(client, func() { got = client.App("client", "lookup", name) })
			if len(got.Addresses) != 1 || !want(got.Addresses[0]) || grown["dns"] == 0 {
				t.Errorf("lookup of %s: %s, verdicts grew by %v", name, got, grown)
			}
		}
		if got := client.App("client", "lookup", "nobody.example"); !strings.Contains(got.Error, "no such host") {
			t.Errorf("lookup of a name that is not there: %s", got)
		}
	})

	for _, only := range []bool{false, true} {
		t.Run(fmt.Sprintf("Out/MeshDestinationsOnly=%v", only), func(t *testing.T) {
			n := n.For(t)
			n.ConfigEntry(map[string]any{"Kind": "mesh", "TransparentProxy": map[string]any{"MeshDestinationsOnly": only}})
			ipv6Out(t, n, client, only)
		})
	}

	t.Run("ExcludedCIDR", func(t *testing.T) {
		n := n.For(t)
		target := "[" + n.AddNeighbourAddress("fd00:99::3") + "]:80"
		seen := listenOnNeighbour(t, n, target)
		var got wire.Outcome
		grown := counted(client, func() { got = client.App("client", "dial", "tcp6", target) })
		own := address(t, client, netip.Addr.Is6)
		if came := seen(); got.Error != "" || grown["cidr_excluded"] != 1 || len(came) != 1 || !strings.HasPrefix(got.From, "["+own+"]") {
			t.Errorf("got %s, verdicts grew by %v, the neighbour saw %v; want the task's own connection there, cidr_excluded 1", got, grown, came)
		}
	})

	t.Run("In", func(t *testing.T) {
		for _, each := range []struct {
			a       *nomad.Alloc
			verdict string
		}{{server, "refused_inbound_no_proxy"}, {plain, "refused_guard"}} {
			target := fmt.Sprintf("http://[%s]:8080/", address(t, each.a, netip.Addr.Is6))
			for from, get := range fromOutside(n, client, target) {
				if strings.Contains(from, "bridge") {
					continue // the transparent neighbour's own proxy is in the way
				}
				var got wire.Outcome
				grown := counted(each.a, func() { got = get() })
				if got.Errno != syscall.ECONNREFUSED || grown[each.verdict] != 1 {
					t.Errorf("GET %s from %s: %s, verdicts grew by %v; want %s 1", target, from, got, grown, each.verdict)
				}
			}
		}
		// "plain" is the neighbour that no proxy redirects.
		target := fmt.Sprintf("http://[%s]:8080/", address(t, server, netip.Addr.Is6))
		var got wire.Outcome
		grown := counted(server, func() { got = plain.Get("plain", target) })
		if got.Errno != syscall.ECONNREFUSED || grown["refused_inbound_no_proxy"] != 1 {
			t.Errorf("GET %s from a neighbour on the bridge: %s, verdicts grew by %v; want a refusal", target, got, grown)
		}
	})

	t.Run("GuardOfTheNode", func(t *testing.T) {
		if w := plain.Workload(); w.Guard != "enforce" || w.Mode != "direct" {
			t.Errorf("workload is %+v, want direct, enforce", w)
		}
		wantMesh(t, plain.EventuallyGet("plain", "http://"+plain.Env("plain")["NOMAD_UPSTREAM_ADDR_v6_server"]+"/", nil), server, "v6-plain")
		for _, at := range []string{
			nomad.NodeAddress + ":9601", address(t, plain, netip.Addr.Is4) + ":8081", "[" + address(t, plain, netip.Addr.Is6) + "]:8081",
		} {
			if got := n.Get(n.Neighbour(), "http://"+at+"/"); got.Reply == nil || got.Reply.Alloc != plain.ID {
				t.Errorf("GET the mapped port at %s: %s, want the task's answer", at, got)
			}
		}
		target := fmt.Sprintf("http://%s:8080/", address(t, plain, netip.Addr.Is4))
		var got wire.Outcome
		grown := counted(plain, func() { got = n.Get(n.Neighbour(), target) })
		if got.Errno != syscall.ECONNREFUSED || grown["refused_guard"] != 1 {
			t.Errorf("GET %s: %s, verdicts grew by %v; want a refusal", target, got, grown)
		}
	})

	t.Run("APIGateways", func(t *testing.T) { apiGateways(t, n.For(t), server, plain, "v6-server") })

	job.Stop()
	if !t.Failed() {
		n.ExpectNothingLeft()
	}
}

// address is the allocation's own address of a family.
func address(t *testing.T, a *nomad.Alloc, family func(netip.Addr) bool) string {
	t.Helper()
	for _, text := range a.Workload().Addresses {
		if addr, err := netip.ParseAddr(text); err == nil && family(addr) {
			return text
		}
	}
	t.Fatalf("allocation %s has the addresses %v, want one of each family", a.ID, a.Workload().Addresses)
	panic("unreachable")
}

// ipv6Out dials the neighbour by IPv6: nobody but Envoy may ever come there.
func ipv6Out(t *testing.T, n *nomad.Node, client *nomad.Alloc, only bool) {
	const task, service = "connect-proxy-v6-client", "v6-client"
	serveNeighbour(t, n, nomad.NeighbourAddress+":80")
	client.EventuallyGet("client", "http://"+nomad.NeighbourAddress+"/", func(got wire.Outcome) error {
		if (got.Reply != nil) == only {
			return fmt.Errorf("got %s, want Envoy to know that it may pass nothing on: %v", got, only)
		}
		return nil
	})
	seen := listenOnNeighbour(t, n, "[fd00:99::1]:80")
	for _, each := range []struct {
		socket, verdict string
		args            []string
		out             int // connections of Envoy's
	}{
		// Envoy listens on IPv4 alone.
		{"BothFamilies", "redirected", []string{"get", "http://[fd00:99::1]/"}, map[bool]int{false: 1, true: 0}[only]},
		{"IPv6Only", "refused_family", []string{"dial", "tcp6", "[fd00:99::1]:80"}, 0},
	} {
		t.Run(each.socket, func(t *testing.T) {
			before, saw := client.EnvoyStat(task, service, outbound), len(seen())
			var got wire.Outcome
			grown := counted(client, func() { got = client.App("client", each.args...) })
			taken := client.EnvoyStat(task, service, outbound) - before
			if grown[each.verdict] != 1 || taken != grown["redirected"] || grown["proxy"] != uint64(each.out) {
				t.Errorf("%s: verdicts grew by %v, Envoy took %d; want %s 1, %d connections of Envoy's", got, grown, taken, each.verdict, each.out)
			}
			if each.verdict == "refused_family" && got.Errno != syscall.ENETUNREACH {
				t.Errorf("got %s, want ENETUNREACH", got)
			}
			if came := seen()[saw:]; len(came) != each.out {
				t.Errorf("the neighbour saw %v, want %d connections", came, each.out)
			}
		})
	}
}
