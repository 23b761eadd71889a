// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// soon is how long the kernel may be behind Consul where no registration of the
// node's own changes.
const soon = 15 * time.Second

// abroad registers an instance of a service with a sidecar on another node: no
// registration of this one changes.
func (n *meshNode) abroad(service string) {
	n.t.Helper()
	at := object{"Node": "abroad", "Address": "192.0.2.1"}
	n.consul.Put("/v1/catalog/register", with(at, object{"Service": object{"ID": service, "Service": service, "Port": 8080}}))
	n.consul.Put("/v1/catalog/register", with(at, object{"Service": object{
		"Kind": "connect-proxy", "ID": service + "-proxy", "Service": service + "-proxy", "Port": 20000, "Proxy": object{"DestinationServiceName": service},
	}}))
}

// gone takes it away.
func (n *meshNode) gone(service string) {
	n.t.Helper()
	for _, id := range []string{service, service + "-proxy"} {
		n.consul.Put("/v1/catalog/deregister", object{"Node": "abroad", "ServiceID": id})
	}
}

func with(base, more object) object {
	both := object{}
	for _, values := range []object{base, more} {
		for key, value := range values {
			both[key] = value
		}
	}
	return both
}

// When the last instance of an upstream ends, wherever it ran, Consul may give
// its virtual IP to another service at once. The kernel follows: what is dialled
// there does not reach the former upstream's listener.
func TestVirtualIPThatBecomesAnothers(t *testing.T) {
	n := newMeshNode(t, false)
	n.runAgent()
	n.abroad("api")
	stolen := n.virtualIP("api")
	web := n.allocate("")
	web.register("web", object{"Port": 20002, "Proxy": object{"Upstreams": []object{{"DestinationName": "api", "LocalBindPort": 9191}}}})
	has := func(addrs ...netip.Addr) func(workload.MeshConfig) bool {
		return func(o workload.MeshConfig) bool {
			if len(addrs) == 0 {
				return len(o.Upstreams) == 0
			}
			return len(o.Upstreams) == 1 && slices.Equal(o.Upstreams[0].Addresses, addrs)
		}
	}
	web.eventually("the upstream's virtual IP", has(stolen))
	listener := test.EchoProcess(t, web.spec(101), "tcp4", "127.0.0.1:9191")
	task, target := test.NewClient(t, web.spec(1000)), netip.AddrPortFrom(stolen, 80).String()
	if answer, err := task.Ask("tcp4", target); err != nil || answer.Server != listener.Name {
		t.Fatalf("dial of %s = %+v, %v; want %q", target, answer, err, listener.Name)
	}

	n.gone("api")
	n.abroad("thief")
	began := time.Now()
	if taken := n.virtualIP("thief"); taken != stolen {
		t.Fatalf("another service has %s, want the freed %s", taken, stolen)
	}
	web.eventually("the upstream to have no virtual IP", has())
	wantSoon(t, "the virtual IP went", began)
	if answer, err := task.Ask("tcp4", target); err == nil && answer.Server == listener.Name {
		t.Errorf("dial of %s, which is another service's, reaches the former upstream's listener", target)
	}

	began = time.Now()
	n.abroad("api")
	again := n.virtualIP("api")
	if again == stolen {
		t.Fatalf("api has %s again, which is another's", again)
	}
	web.eventually("the upstream's new virtual IP", has(again))
	wantSoon(t, "the new virtual IP came", began)
	target = netip.AddrPortFrom(again, 80).String()
	if answer, err := task.Ask("tcp4", target); err != nil || answer.Server != listener.Name {
		t.Errorf("dial of %s = %+v, %v; want %q", target, answer, err, listener.Name)
	}
}

// A virtual IP that a configuration entry keeps goes with the entry: no list of
// services tells of that.
func TestVirtualIPOfAServiceWithoutInstances(t *testing.T) {
	n := newMeshNode(t, false)
	n.runAgent()
	web := n.allocate("")
	web.register("web", object{"Port": 20002, "Proxy": object{"Upstreams": []object{{"DestinationName": "api", "LocalBindPort": 9191}}}})
	web.eventually("web to be configured", func(o workload.MeshConfig) bool { return o.InboundPort == 20002 })
	began := time.Now()
	n.consul.Put("/v1/config", object{"Kind": "service-defaults", "Name": "api", "Protocol": "tcp"})
	kept := n.virtualIP("api")
	web.eventually("the virtual IP", func(o workload.MeshConfig) bool {
		return len(o.Upstreams) == 1 && slices.Contains(o.Upstreams[0].Addresses, kept)
	})
	wantSoon(t, "the virtual IP came", began)
	began = time.Now()
	n.consul.Delete("/v1/config/service-defaults/api")
	web.eventually("the virtual IP to go", func(o workload.MeshConfig) bool { return len(o.Upstreams) == 0 })
	wantSoon(t, "the virtual IP went", began)
}

// An ingress or API gateway gets a listener by its configuration entry alone. In
// enforce the port is open soon after, and shut soon after the listener goes.
func TestGatewayGetsAListener(t *testing.T) {
	for _, kind := range []string{"ingress", "api"} {
		t.Run(kind, func(t *testing.T) {
			n := newMeshNode(t, false)
			n.config.Guard.Default = string(workload.GuardEnforce)
			n.runAgent()
			a := n.allocate("")
			listen := func(ports ...uint16) {
				var listeners []object
				for _, port := range ports {
					listener := object{"Port": port, "Protocol": "tcp"}
					if kind == "api" {
						listener["Name"] = fmt.Sprintf("listener-%d", port)
					} else {
						listener["Services"] = []object{{"Name": fmt.Sprintf("service-%d", port)}}
					}
					listeners = append(listeners, listener)
				}
				n.consul.Put("/v1/config", object{"Kind": kind + "-gateway", "Name": "door", "Listeners": listeners})
			}
			listen(9090)
			a.registerGateway(kind, "door", nil)
			open := func(ports ...uint16) func(workload.MeshConfig) bool {
				return func(o workload.MeshConfig) bool { return slices.Equal(o.ExposedPorts, ports) }
			}
			a.eventually("the first listener to be open", open(9090))
			server := test.EchoProcess(t, a.spec(101), "tcp4", "0.0.0.0:9191")
			ask := func() error {
				answer, err := test.Ask(n.outside, "tcp4", a.at(9191).String())
				if err == nil && answer.Server != server.Name {
					err = fmt.Errorf("another server answers: %+v", answer)
				}
				return err
			}
			if err := ask(); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Fatalf("dial of a port that is no listener: %v, want %v", err, syscall.ECONNREFUSED)
			}
			began := time.Now()
			listen(9090, 9191)
			a.eventually("the second listener to be open", open(9090, 9191))
			wantSoon(t, "the listener was open", began)
			if err := ask(); err != nil {
				t.Errorf("dial of the new listener: %v", err)
			}
			began = time.Now()
			listen(9090)
			a.eventually("the second listener to be shut", open(9090))
			wantSoon(t, "the listener was shut", began)
			if err := ask(); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("dial of the former listener: %v, want %v", err, syscall.ECONNREFUSED)
			}
		})
	}
}

func wantSoon(t *testing.T, what string, began time.Time) {
	t.Helper()
	took := time.Since(began)
	t.Logf("%s after %s", what, took.Round(time.Millisecond))
	if took > soon {
		t.Errorf("%s after %s, want at most %s", what, took.Round(time.Millisecond), soon)
	}
}
