// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/envoy"
	"github.com/weirmesh/weir/test/spawn"
)

// sidecarAdmin is where Envoy's administration is unless told otherwise.
const sidecarAdmin = "127.0.0.2:19001"

// startEnvoy runs the proxy as Nomad does: from the bootstrap that Consul makes
// for its registration, with a user and a cgroup of its own.
func (a *meshAlloc) startEnvoy(proxyID string, more ...string) {
	t := a.node.t
	t.Helper()
	binary, err := envoy.Find()
	if err != nil {
		test.Need(t, test.Tool("envoy"))
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "weir-envoy-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	bootstrap := filepath.Join(dir, "bootstrap.json")
	if err := os.WriteFile(bootstrap, a.node.consul.Bootstrap(proxyID, sidecarAdmin, more...), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "envoy.log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if data, _ := os.ReadFile(log.Name()); t.Failed() {
			t.Logf("Envoy of %s wrote:\n%s", proxyID, data)
		}
		log.Close()
	})
	process, err := spawn.Start(spawn.Spec{
		Binary: binary, Args: []string{"-c", bootstrap, "--disable-hot-restart", "--concurrency", "1", "--log-level", "warn"},
		NetNS: a.ns.Path, Cgroup: a.node.cgroup.Child(t, "envoy-"+proxyID).Path, UID: 101, Dir: dir, Stdout: log, Stderr: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := process.Stop(5 * time.Second); err != nil {
			t.Logf("Envoy ended: %v", err)
		}
	})
}

// intend sets the one intention for a service.
func (n *meshNode) intend(service, source, action string) {
	n.t.Helper()
	n.consul.Put("/v1/config", object{"Kind": "service-intentions", "Name": service, "Sources": []object{{"Name": source, "Action": action}}})
}

// Two allocations, each with the Envoy that Consul configures: an explicit
// upstream by its port, by its virtual IP and by its name, and transparent_proxy
// without one, all through mTLS and under Consul's intentions. The tasks'
// resolver is Consul's own, asked by UDP and by TCP.
func TestMeshOfConsulAndEnvoy(t *testing.T) {
	n := newConsulNode(t)
	n.runAgent()

	apiAlloc := n.allocate("")
	apiAlloc.startEnvoy(apiAlloc.register("api", object{"Port": 20001}))
	server := test.EchoProcess(t, apiAlloc.spec(1000), "tcp4", "127.0.0.1:8080")
	virtual := netip.AddrPortFrom(n.virtualIP("api"), 80).String()
	const name = "api.virtual.consul:80"

	t.Run("an explicit upstream", func(t *testing.T) {
		web := n.allocate("")
		web.startEnvoy(web.register("web", object{"Port": 20002, "Proxy": object{"Upstreams": []object{{"DestinationName": "api", "LocalBindPort": 9191}}}}))
		task := web.newHeld()
		resolver := netip.AddrPortFrom(web.gate, n.consul.DNS)
		n.intend("api", "web", "allow")
		web.eventually("the virtual IP", func(o workload.MeshConfig) bool { return len(o.Upstreams) == 1 })
		wantServed(t, task, "127.0.0.1:9191", server.Name) // by now both proxies know all of it
		steered := web.counted(t, bpfmap.ToUpstream)
		apiAlloc.wantProved(t, task, "127.0.0.1:9191", server.Name)
		apiAlloc.wantProved(t, task, virtual, server.Name)
		for _, network := range []string{"udp", "tcp"} {
			apiAlloc.wantProved(t, task.asking(network, resolver), name, server.Name)
		}
		if rose := web.counted(t, bpfmap.ToUpstream) - steered; rose != 3 {
			t.Errorf("%d connections were sent to the upstream's listener, want 3", rose)
		}
		n.intend("api", "web", "deny")
		for _, target := range []string{"127.0.0.1:9191", virtual} {
			wantRefused(t, task, target)
		}
		for _, network := range []string{"udp", "tcp"} {
			wantRefused(t, task.asking(network, resolver), name)
		}
	})

	t.Run("transparent_proxy", func(t *testing.T) {
		gate := netip.AddrFrom4([4]byte{10, 88, byte(n.allocs + 1), 1})
		shop := n.allocate(fmt.Sprintf(
			`{"ProxyUserID":"101","ProxyInboundPort":0,"ProxyOutboundPort":15001,"ConsulDNSIP":%q,"ConsulDNSPort":%d}`, gate, n.consul.DNS))
		sidecar := object{"Port": 20003, "Proxy": object{"Mode": "transparent"}}
		shop.startEnvoy(shop.register("shop", sidecar))
		task := shop.newHeld()
		resolver := netip.AddrPortFrom(gate, 53) // as in the resolv.conf that Nomad writes
		served := func() {
			t.Helper()
			wantServed(t, task, virtual, server.Name)
			apiAlloc.wantProved(t, task, virtual, server.Name)
			for _, network := range []string{"udp", "tcp"} {
				before := shop.counted(t, bpfmap.ToDNS)
				apiAlloc.wantProved(t, task.asking(network, resolver), name, server.Name)
				if shop.counted(t, bpfmap.ToDNS) == before {
					t.Errorf("no question by %s was sent to Consul's resolver", network)
				}
			}
		}
		n.intend("api", "shop", "allow")
		served()
		outside := netip.AddrPortFrom(gate, 7000).String()
		elsewhere := test.EchoProcess(t, test.Spec{NetNS: n.outside, UID: 1000, GID: 1000}, "tcp4", outside)
		wantServed(t, task, outside, elsewhere.Name)
		n.consul.Put("/v1/config", object{"Kind": "mesh", "TransparentProxy": object{"MeshDestinationsOnly": true}})
		wantRefused(t, task, outside)
		served()
		if server, err := task.say("open", virtual); err != nil {
			t.Errorf("dial: %q, %v", server, err)
		}
		n.consul.Put("/v1/config", object{"Kind": "service-defaults", "Name": "shop", "TransparentProxy": object{"OutboundListenerPort": 15009}})
		shop.eventually("the outbound port to move", func(o workload.MeshConfig) bool { return o.OutboundPort == 15009 })
		served()
		if word, err := task.say("open", virtual); err != nil || word != "still here" {
			t.Errorf("the open connection says %q, %v", word, err)
		}
		n.intend("api", "shop", "deny")
		wantRefused(t, task, virtual)
		for _, network := range []string{"udp", "tcp"} {
			wantRefused(t, task.asking(network, resolver), name)
		}
		n.consul.Put("/v1/config", object{"Kind": "mesh", "TransparentProxy": object{"MeshDestinationsOnly": false}})
		wantServed(t, task, outside, elsewhere.Name)
	})
}

// wantProved dials once, and wants the server's answer and one more handshake of
// TLS at the server's Envoy, at the end of which both ends know who the other is.
func (a *meshAlloc) wantProved(t *testing.T, task held, target, server string) {
	t.Helper()
	before := a.stat(t, "ssl.handshake")
	if got, err := task.exchange(target); err != nil || got != server {
		t.Errorf("%s = %q, %v; want %q", target, got, err, server)
	}
	if rose := a.stat(t, "ssl.handshake") - before; rose != 1 {
		t.Errorf("the dial of %s made %d handshakes of TLS, want 1", target, rose)
	}
	if nameless := a.stat(t, "ssl.no_certificate"); nameless != 0 {
		t.Errorf("%d clients showed no certificate", nameless)
	}
}

// stat is a number that the allocation's Envoy counts for its public listener,
// whose port in these tests begins with 2.
func (a *meshAlloc) stat(t *testing.T, name string) (value int) {
	t.Helper()
	value, err := a.listenerStat("2[0-9]*", name)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// listenerStat is a number that the allocation's Envoy counts for the listener
// whose port matches the expression.
func (a *meshAlloc) listenerStat(port, name string) (value int, err error) {
	text, err := get(client(a.ns), "http://"+sidecarAdmin+"/stats?filter=^listener.[0-9.]*_"+port+"."+name+"$")
	if err != nil {
		return 0, err
	}
	if _, err := fmt.Sscanf(text[strings.LastIndex(text, " ")+1:], "%d", &value); err != nil {
		return 0, fmt.Errorf("Envoy has no %s of a listener at port %s: %q", name, port, text)
	}
	return value, nil
}

// wantPassed waits until a dial is answered by the server, which it has to reach
// through that listener of the allocation's Envoy.
func (a *meshAlloc) wantPassed(t *testing.T, task held, target, server string, port uint16) {
	t.Helper()
	const taken = "downstream_cx_total"
	before, _ := a.listenerStat(fmt.Sprint(port), taken) // it may not be there yet
	wantServed(t, task, target, server)
	if after, err := a.listenerStat(fmt.Sprint(port), taken); err != nil || after <= before {
		t.Errorf("%s was answered, but the listener at port %d had taken %d connections and has taken %d, %v", target, port, before, after, err)
	}
}
