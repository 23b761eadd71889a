// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/envoy"
	"github.com/weirmesh/weir/test/spawn"
)

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
	if err := os.WriteFile(bootstrap, a.node.consul.Bootstrap(proxyID, "127.0.0.2:19001", more...), 0o644); err != nil {
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
		NetNS: a.ns.Path, Cgroup: a.node.cgroup.Child(t, fmt.Sprintf("envoy-%s", a.id)).Path, UID: 101, Dir: dir, Stdout: log, Stderr: log,
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

// exchange dials anew and sends a word, which the server returns: Envoy's RBAC
// filter judges the first bytes of a client, and these servers speak first.
func (h held) exchange(target string) (server string, err error) {
	name, at := time.Now().String(), netip.MustParseAddrPort(target)
	greeting, err := h.say(name, at)
	if err == nil {
		_, err = h.say(name, at)
	}
	return servedBy(greeting), err
}

// wantServed waits until a dial is answered by the server; a mesh takes a moment to
// follow a change.
func wantServed(t *testing.T, task held, target, server string) {
	t.Helper()
	test.Eventually(t, func() error {
		got, err := task.exchange(target)
		if err == nil && got != server {
			err = fmt.Errorf("answered by %q", got)
		}
		return err
	}, fmt.Sprintf("%s to be answered by %q", target, server))
}

func wantRefused(t *testing.T, task held, target string) {
	t.Helper()
	test.Eventually(t, func() error {
		if server, err := task.exchange(target); err == nil {
			return fmt.Errorf("answered by %q", server)
		}
		return nil
	}, target+" to be refused")
}

// Two allocations, each with the Envoy that Consul configures: an explicit
// upstream by its port and by its virtual IP, and transparent_proxy without one,
// all through mTLS and under Consul's intentions.
func TestMeshOfConsulAndEnvoy(t *testing.T) {
	n := newMeshNode(t, false)
	n.outside.Do(func() {
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644); err != nil {
			t.Error(err)
		}
	})
	n.runAgent()

	api := n.allocate("")
	api.startEnvoy(api.register("api", object{"Port": 20001}))
	server := test.EchoProcess(t, api.spec(1000), "tcp4", "127.0.0.1:8080")
	virtual := netip.AddrPortFrom(n.virtualIP("api"), 80).String()

	t.Run("an explicit upstream", func(t *testing.T) {
		web := n.allocate("")
		web.startEnvoy(web.register("web", object{"Port": 20002, "Proxy": object{"Upstreams": []object{{"DestinationName": "api", "LocalBindPort": 9191}}}}))
		task := web.newHeld()
		n.intend("api", "web", "allow")
		wantServed(t, task, "127.0.0.1:9191", server.Name)
		web.eventually("the virtual IP", func(o redirect.Overlay) bool { return len(o.Upstreams) == 1 })
		wantServed(t, task, virtual, server.Name)
		n.intend("api", "web", "deny")
		wantRefused(t, task, "127.0.0.1:9191")
		wantRefused(t, task, virtual)
	})

	t.Run("transparent_proxy", func(t *testing.T) {
		shop := n.allocate(`{"ProxyUserID":"101","ProxyInboundPort":0,"ProxyOutboundPort":15001}`)
		sidecar := object{"Port": 20003, "Proxy": object{"Mode": "transparent"}}
		shop.startEnvoy(shop.register("shop", sidecar))
		task := shop.newHeld()
		n.intend("api", "shop", "allow")
		wantServed(t, task, virtual, server.Name)
		outside := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 88, byte(n.allocs), 1}), 7000).String()
		elsewhere := test.EchoProcess(t, test.Spec{NetNS: n.outside, UID: 1000, GID: 1000}, "tcp4", outside)
		wantServed(t, task, outside, elsewhere.Name)
		n.consul.Put("/v1/config", object{"Kind": "mesh", "TransparentProxy": object{"MeshDestinationsOnly": true}})
		wantRefused(t, task, outside)
		wantServed(t, task, virtual, server.Name)
		n.consul.Put("/v1/config", object{"Kind": "proxy-defaults", "Name": "global", "TransparentProxy": object{"OutboundListenerPort": 15009}})
		shop.eventually("the outbound port to move", func(o redirect.Overlay) bool { return o.OutboundPort == 15009 })
		wantServed(t, task, virtual, server.Name)
		n.intend("api", "shop", "deny")
		wantRefused(t, task, virtual)
	})
}
