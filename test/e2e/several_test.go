// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// pair is an allocation with two services, each with an Envoy of its own under
// the UID of both: its name, its application and that one's port.
type pair struct {
	*meshAlloc
	name   [2]string
	server [2]*test.ServerProcess
}

// newPair registers two services and runs their proxies. Their listeners are at
// 20001 and 20002.
func (a *meshAlloc) newPair(names [2]string, sidecar func(i int) object) *pair {
	p := &pair{meshAlloc: a, name: names}
	for i, name := range names {
		settings := sidecar(i)
		settings["LocalServicePort"] = 8080 + i
		proxy := a.register(name, object{"Port": 20001 + i, "Proxy": settings, "Meta": object{"weir-guard": "enforce"}})
		a.startEnvoy(proxy, "-admin-bind", fmt.Sprintf("127.0.0.%d:19001", 3+i))
		p.server[i] = test.EchoProcess(a.node.t, a.spec(1000), "tcp4", fmt.Sprintf("127.0.0.1:%d", 8080+i))
	}
	return p
}

// only lets one service dial another, and nobody else.
func (n *meshNode) only(service, source string) {
	n.t.Helper()
	n.consul.Put("/v1/config", object{"Kind": "service-intentions", "Name": service, "Sources": []object{
		{"Name": source, "Action": "allow"}, {"Name": "*", "Action": "deny"}}})
}

// Two sidecars in one namespace, plain and transparent: each one's upstreams and
// connections go to it, under its own name, and to its listener come those that
// are for its service.
func TestSeveralSidecars(t *testing.T) {
	n := newMeshNode(t, false)
	n.outside.Do(func() {
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644); err != nil {
			t.Error(err)
		}
	})
	n.runAgent()
	// Each may be dialled by one service alone, so the answer tells whose Envoy asked.
	servers := map[string]*test.ServerProcess{}
	virtual := func(name string) string { return netip.AddrPortFrom(n.virtualIP(name), 80).String() }
	destination := func(name string) {
		a := n.allocate("")
		a.startEnvoy(a.register(name, object{"Port": 20001}))
		servers[name] = test.EchoProcess(t, a.spec(1000), "tcp4", "127.0.0.1:8080")
	}
	destination("db")
	destination("cache")
	shop := n.allocate(meshRequest)
	shop.startEnvoy(shop.register("shop", object{"Port": 20001, "Proxy": object{"Mode": "transparent"}}))
	visitor := shop.newHeld()

	t.Run("plain", func(t *testing.T) {
		p := n.allocate("").newPair([2]string{"front", "back"}, func(i int) object {
			return object{"Upstreams": []object{{"DestinationName": []string{"db", "cache"}[i], "LocalBindPort": 9191 + i}}}
		})
		n.only("db", "front")
		n.only("cache", "back")
		p.eventually("both upstreams and both proxies", func(o workload.MeshConfig) bool {
			return len(o.Upstreams) == 2 && o.InboundPort == 20002 && len(o.Proxies) == 1 && o.Proxies[0].InboundPort == 20001
		})
		task := p.newHeld()
		for i, name := range []string{"db", "cache"} {
			wantServed(t, task, fmt.Sprintf("127.0.0.1:%d", 9191+i), servers[name].Name)
			wantServed(t, task, virtual(name), servers[name].Name)
		}
		for i, name := range p.name {
			wantServed(t, visitor, virtual(name), p.server[i].Name)
		}
		if w, err := p.workload(); err != nil || len(w.Problems) > 0 || w.Proxy.Identity != inspect.IdentityCgroup ||
			len(w.Sidecars) != 1 || w.Sidecars[0].Identity != inspect.IdentityCgroup || w.Sidecars[0].Cgroup == w.Proxy.Cgroup {
			t.Errorf("in the kernel: %+v, %v; want two proxies, told by their cgroups", w, err)
		}
		test.EchoProcess(t, p.spec(1000), "tcp4", "0.0.0.0:8888")
		wantRefused(t, visitor, p.at(8888).String())
		if p.counted(t, bpfmap.RefusedGuard) == 0 {
			t.Error("the guard refused nothing")
		}
	})

	t.Run("transparent", func(t *testing.T) {
		sidecar := func(outbound int) object {
			return object{"Mode": "transparent", "TransparentProxy": object{"OutboundListenerPort": outbound}}
		}
		p := n.allocate(meshRequest).newPair([2]string{"admin", "web"}, func(i int) object { return sidecar(15001 + i) })
		n.only("db", "web")
		n.only("cache", "admin")
		task := p.newHeld()
		wantServed(t, task, virtual("cache"), servers["cache"].Name)
		p.eventually("what web owns", func(o workload.MeshConfig) bool {
			return o.Service == "admin" && len(o.Proxies) == 1 && o.Proxies[0].OutboundPort == 15002 && len(o.Proxies[0].VirtualIPs) == 1
		})
		wantServed(t, task, virtual("db"), servers["db"].Name)
		for i, name := range p.name {
			wantServed(t, visitor, virtual(name), p.server[i].Name)
		}
		outside := netip.AddrPortFrom(p.addr.Prev(), 7000).String()
		elsewhere := test.EchoProcess(t, test.Spec{NetNS: n.outside, UID: 1000, GID: 1000}, "tcp4", outside)
		wantServed(t, task, outside, elsewhere.Name)
		if w, err := p.workload(); err != nil || len(w.Problems) > 0 || w.Proxy.Identity != inspect.IdentityCgroup ||
			len(w.Sidecars) != 1 || w.Sidecars[0].Identity != inspect.IdentityCgroup || w.Sidecars[0].Listeners != 2 {
			t.Errorf("in the kernel: %+v, %v; want two proxies, told by their cgroups", w, err)
		}
		settings := sidecar(15001)
		settings["LocalServicePort"] = 8081
		p.register("web", object{"Port": 20002, "Proxy": settings})
		test.Eventually(t, func() error {
			view, err := p.view()
			if err == nil && !strings.Contains(fmt.Sprint(view.Problems), "port 15001 is that of service admin already") {
				err = fmt.Errorf("problems %q", view.Problems)
			}
			return err
		}, "two proxies on one port to be told")
		wantServed(t, task, virtual("cache"), servers["cache"].Name)
	})
}
