// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/test"
)

// gatewayPort is where Nomad lets a gateway's own listener be.
const gatewayPort = 8443

// registerGateway registers a gateway by the ID that Nomad gives, bound as
// Nomad binds it.
func (a *meshAlloc) registerGateway(kind, name string) (id string) {
	a.node.t.Helper()
	id = fmt.Sprintf("_nomad-task-%s-group-g-%s-%d", a.id, name, gatewayPort)
	a.node.consul.Register(object{"Kind": kind, "Name": name, "ID": id, "Address": a.addr.String(), "Port": gatewayPort, "Proxy": object{
		"Config": object{
			"envoy_gateway_no_default_bind": true,
			"envoy_gateway_bind_addresses":  object{"default": object{"address": "0.0.0.0", "port": gatewayPort}},
		},
	}})
	return id
}

// Gateways are recognised by their kind, nothing of theirs is redirected, and
// their listeners are what is open, those too that only a config entry names.
func TestGateways(t *testing.T) {
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
	stranger := held{test.Helper(t, test.Spec{NetNS: n.outside, UID: 1000, GID: 1000}, holdFunc)}

	wantGateway := func(t *testing.T, a *meshAlloc, open ...uint16) {
		t.Helper()
		a.eventually("the gateway's listeners", func(o redirect.Overlay) bool { return slices.Equal(o.ExcludeInboundPorts, open) })
		if w, err := a.workload(); err != nil || w.Mode != redirect.ModeGateway || len(w.Problems) > 0 {
			t.Errorf("the kernel has %+v, %v; want mode gateway without problems", w, err)
		}
	}

	t.Run("ingress", func(t *testing.T) {
		n.consul.Put("/v1/config", object{"Kind": "ingress-gateway", "Name": "ingress", "Listeners": []object{
			{"Port": 9090, "Protocol": "tcp", "Services": []object{{"Name": "api"}}}}})
		a := n.allocate("")
		a.startEnvoy(a.registerGateway("ingress-gateway", "ingress"), "-gateway", "ingress")
		wantGateway(t, a, gatewayPort, 9090)
		wantServed(t, stranger, netip.AddrPortFrom(a.addr, 9090).String(), server.Name)
	})

	t.Run("api", func(t *testing.T) {
		n.consul.Put("/v1/config", object{"Kind": "api-gateway", "Name": "front", "Listeners": []object{{"Name": "tcp", "Port": 9191, "Protocol": "tcp"}}})
		n.consul.Put("/v1/config", object{"Kind": "tcp-route", "Name": "route", "Services": []object{{"Name": "api"}},
			"Parents": []object{{"Kind": "api-gateway", "Name": "front"}}})
		a := n.allocate("")
		// It registers itself, so its ID does not name the allocation.
		n.consul.Register(object{"Kind": "api-gateway", "Name": "front", "ID": "front", "Address": a.addr.String(), "Port": gatewayPort})
		a.startEnvoy("front", "-gateway", "api")
		wantGateway(t, a, gatewayPort, 9191)
		wantServed(t, stranger, netip.AddrPortFrom(a.addr, 9191).String(), server.Name)
	})

	t.Run("terminating", func(t *testing.T) {
		legacyAddr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 88, 1, 1}), 7070)
		legacy := test.EchoProcess(t, test.Spec{NetNS: n.outside, UID: 1000, GID: 1000}, "tcp4", legacyAddr.String())
		n.consul.Put("/v1/catalog/register", object{"Node": "legacy", "Address": legacyAddr.Addr().String(),
			"Service": object{"Service": "legacy", "Port": legacyAddr.Port()}})
		n.consul.Put("/v1/config", object{"Kind": "terminating-gateway", "Name": "exit", "Services": []object{{"Name": "legacy"}}})
		a := n.allocate("")
		a.startEnvoy(a.registerGateway("terminating-gateway", "exit"), "-gateway", "terminating")
		wantGateway(t, a, gatewayPort)
		web := n.allocate("")
		web.startEnvoy(web.register("web", object{"Port": 20002, "Proxy": object{"Upstreams": []object{{"DestinationName": "legacy", "LocalBindPort": 9292}}}}))
		task := web.newHeld()
		wantServed(t, task, "127.0.0.1:9292", legacy.Name)
		wantServed(t, task, netip.AddrPortFrom(n.virtualIP("legacy"), 80).String(), legacy.Name)
	})

	t.Run("mesh", func(t *testing.T) {
		a := n.allocate("")
		a.startEnvoy(a.registerGateway("mesh-gateway", "mesh"), "-gateway", "mesh")
		wantGateway(t, a, gatewayPort)
	})
}
