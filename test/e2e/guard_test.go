// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// guarded is what a task binds in the allocation of TestGuard, and what the guard
// makes of it.
var guarded = []struct {
	what, network string
	port          uint16
	open          bool // to everybody, whatever the guard
}{
	{"the proxy", "tcp", 20001, true},
	{"a server on the proxy's port", "udp", 20001, false},
	{"the application", "tcp", 8080, false},
	{"the application", "udp", 8080, false},
	{"one that binds IPv4 alone", "tcp4", 8088, false},
	{"one that binds IPv4 alone", "udp4", 8088, false},
	{"a mapped port", "tcp", 8081, true},
	{"a mapped port", "udp", 8081, true},
	{exposePath, "tcp", 21500, true},
	{"a task on the port of an expose path", "tcp", 21501, false},
	{"a server on an ephemeral port", "tcp", 40000, false},
	{"a server on an ephemeral port", "udp", 40000, true}, // no reply can be told from it: a limit
}

// exposePath is what the proxy itself binds.
const exposePath = "an expose path"

// The guard of an allocation that no plugin was called for: what a task binds to
// every address is counted in audit and refused in enforce, by TCP and UDP, over
// IPv4 and IPv6, from the host as from a neighbour, while the proxy, mapped ports
// and expose paths stay reachable.
func TestGuard(t *testing.T) {
	n := newMeshNode(t, false)
	n.runAgent()
	a := n.allocate("", map[string]any{"hostPort": 25000, "containerPort": 8081, "protocol": "tcp"})
	neighbour := n.allocate("")
	var servers []*test.ServerProcess
	for _, bound := range guarded {
		addr := "[::]"
		if strings.HasSuffix(bound.network, "4") {
			addr = "0.0.0.0"
		}
		uid := uint32(1000)
		if bound.what == exposePath {
			uid = n.config.Proxy.DefaultUID
		}
		servers = append(servers, test.EchoProcess(t, a.spec(uid), bound.network, fmt.Sprintf("%s:%d", addr, bound.port)))
	}
	register := func(guard string) {
		a.register("api", object{"Port": 20001, "Meta": object{"weir-guard": guard}, "Proxy": object{
			"Expose": object{"Paths": []object{
				{"Path": "/health", "ListenerPort": 21500, "LocalPathPort": 8080},
				{"Path": "/metrics", "ListenerPort": 21501, "LocalPathPort": 8080}}}}})
	}
	// each dials everything from everywhere and returns how many dials went to
	// what is not open.
	each := func(t *testing.T, check func(t *testing.T, open bool, err error)) (closed uint64) {
		t.Helper()
		for from, ns := range map[string]*test.NetNS{"the host": n.outside, "a neighbour": neighbour.ns} {
			for i, bound := range guarded {
				for _, addr := range []netip.Addr{a.addr, a.addr6} {
					if addr.Is6() && strings.HasSuffix(bound.network, "4") {
						continue
					}
					target := netip.AddrPortFrom(addr, bound.port)
					if !bound.open {
						closed++
					}
					t.Run(fmt.Sprintf("%s at %s %s from %s", bound.what, bound.network, target, from), func(t *testing.T) {
						answer, err := test.Ask(ns, bound.network, target.String())
						if err == nil && answer.Server != servers[i].Name {
							t.Errorf("answered by %q, want %q", answer.Server, servers[i].Name)
						}
						check(t, bound.open, err)
					})
				}
			}
		}
		return closed
	}

	register("audit")
	a.wantGuard(t, workload.GuardAudit)
	t.Run("audit", func(t *testing.T) {
		before := a.counted(t, bpfmap.GuardAudited)
		closed := each(t, func(t *testing.T, _ bool, err error) {
			if err != nil {
				t.Errorf("dial: %v", err)
			}
		})
		if rose := a.counted(t, bpfmap.GuardAudited) - before; rose != closed {
			t.Errorf("%d connections and datagrams were counted, want %d", rose, closed)
		}
	})

	register("enforce")
	a.wantGuard(t, workload.GuardEnforce)
	t.Run("enforce", func(t *testing.T) {
		before := a.counted(t, bpfmap.RefusedGuard)
		ephemeral := a.counted(t, bpfmap.GuardEphemeral)
		closed := each(t, func(t *testing.T, open bool, err error) {
			if open && err != nil {
				t.Errorf("dial: %v", err)
			}
			if !open && !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("dial: %v, want ECONNREFUSED", err)
			}
		})
		if rose := a.counted(t, bpfmap.RefusedGuard) - before; rose != closed {
			t.Errorf("%d connections and datagrams were counted as refused, want %d", rose, closed)
		}
		if rose := a.counted(t, bpfmap.GuardEphemeral) - ephemeral; rose != 4 {
			t.Errorf("%d datagrams to an ephemeral port were counted, want 4", rose)
		}
		client := test.NewClient(t, a.spec(1000))
		for _, network := range []string{"tcp", "udp"} {
			for _, host := range []string{"127.0.0.1", "[::1]", a.addr.String(), "[" + a.addr6.String() + "]"} {
				if _, err := client.Ask(network, host+":8080"); err != nil {
					t.Errorf("a task's own dial of %s: %v", host, err)
				}
			}
		}
	})

	t.Run("a job cannot weaken it", func(t *testing.T) {
		register("off")
		a.eventually("the node's own guard", func(o workload.MeshConfig) bool { return o.Guard == workload.GuardAudit })
	})
}

// In a transparent allocation the proxy takes what comes by TCP, whatever the
// guard: nobody outside reaches a task, or Envoy's administration, past it. UDP is
// the guard's, and what the job excludes stays open.
func TestGuardOfATransparentAllocation(t *testing.T) {
	n := newMeshNode(t, false)
	n.runAgent()
	a := n.allocate(`{"ProxyUserID":"101","ProxyInboundPort":0,"ProxyOutboundPort":15001,"ExcludeInboundPorts":["8081"]}`)
	neighbour := n.allocate("")
	register := func(guard workload.Guard) (proxyID string) {
		return a.register("web", object{"Port": 20002, "Meta": object{"weir-guard": guard}, "Proxy": object{"Mode": "transparent"}})
	}
	a.startEnvoy(register(workload.GuardAudit), "-admin-bind", "0.0.0.0:19000")
	const application, excluded, admin = 8080, 8081, 19000
	for _, network := range []string{"tcp", "udp"} {
		for _, port := range []int{application, excluded} {
			test.EchoProcess(t, a.spec(1000), network, fmt.Sprintf("[::]:%d", port))
		}
	}
	test.Eventually(t, func() error { return dials(n.outside, a.at(20002)) }, "Envoy to listen")
	for _, guard := range []workload.Guard{workload.GuardAudit, workload.GuardEnforce} {
		register(guard)
		a.wantGuard(t, guard)
		for from, ns := range map[string]*test.NetNS{"the host": n.outside, "a neighbour": neighbour.ns} {
			t.Run(fmt.Sprintf("%s, from %s", guard, from), func(t *testing.T) {
				for _, port := range []uint16{application, admin} {
					before := a.counted(t, bpfmap.Inbound)
					// The proxy hangs up on who speaks no TLS; a task would greet.
					if status, err := ready(ns, a.at(port)); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("port %d answers %q, %v; want it to be the proxy, which hangs up", port, status, err)
					}
					if a.counted(t, bpfmap.Inbound) == before {
						t.Errorf("no connection to port %d went to the proxy", port)
					}
				}
				// An answer that finds no way yet makes the question come again, and count again.
				test.Eventually(t, func() error {
					_, err := test.Ask(ns, "tcp", netip.AddrPortFrom(a.addr6, excluded).String())
					return err
				}, "a way by IPv6")
				// Consul's Envoy listens on IPv4 alone.
				before := a.counted(t, bpfmap.RefusedInboundNoProxy)
				if _, err := test.Ask(ns, "tcp", netip.AddrPortFrom(a.addr6, application).String()); !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("dial of the application by IPv6 = %v, want ECONNREFUSED", err)
				}
				if rose := a.counted(t, bpfmap.RefusedInboundNoProxy) - before; rose != 1 {
					t.Errorf("%d connections were counted as refused without a proxy, want 1", rose)
				}
				for _, addr := range []netip.Addr{a.addr, a.addr6} {
					for _, network := range []string{"tcp", "udp"} {
						if _, err := test.Ask(ns, network, netip.AddrPortFrom(addr, excluded).String()); err != nil {
							t.Errorf("%s dial of the excluded port at %s: %v", network, addr, err)
						}
					}
					verdict := map[workload.Guard]bpfmap.Verdict{workload.GuardAudit: bpfmap.GuardAudited, workload.GuardEnforce: bpfmap.RefusedGuard}[guard]
					before := a.counted(t, verdict)
					_, err := test.Ask(ns, "udp", netip.AddrPortFrom(addr, application).String())
					if refused := errors.Is(err, syscall.ECONNREFUSED); refused != (guard == workload.GuardEnforce) || !refused && err != nil {
						t.Errorf("datagram to the application at %s: %v", addr, err)
					}
					if rose := a.counted(t, verdict) - before; rose != 1 {
						t.Errorf("%d datagrams were counted as %s, want 1", rose, verdict)
					}
				}
			})
		}
	}
}

// Envoy's administration can stop it and shows its certificates. In enforce nobody
// outside reaches it, bound to every address or to a loopback address of a
// namespace that routes such addresses in from outside.
func TestGuardOfEnvoysAdministration(t *testing.T) {
	n := newMeshNode(t, false)
	test.Need(t, test.Tool("ip"))
	n.runAgent()
	neighbour := n.allocate("")
	for _, c := range []struct {
		name, bind string
		reached    func(a *meshAlloc) netip.AddrPort
	}{
		{"every address", "0.0.0.0:19000", func(a *meshAlloc) netip.AddrPort { return netip.AddrPortFrom(a.addr, 19000) }},
		{"every address of both families", "[::]:19000", func(a *meshAlloc) netip.AddrPort { return netip.AddrPortFrom(a.addr6, 19000) }},
		{"a loopback address", sidecarAdmin, func(a *meshAlloc) netip.AddrPort {
			a.routeLoopback(t, neighbour)
			return netip.MustParseAddrPort(sidecarAdmin)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := n.allocate("")
			guard := func(guard workload.Guard) (proxyID string) {
				return a.register("web", object{"Port": 20002, "Meta": object{"weir-guard": guard}})
			}
			a.startEnvoy(guard(workload.GuardAudit), "-admin-bind", c.bind)
			a.wantGuard(t, workload.GuardAudit)
			admin := c.reached(a)
			from := map[string]*test.NetNS{"the host": n.outside, "a neighbour": neighbour.ns}
			for name, ns := range from {
				test.Eventually(t, func() error {
					_, err := ready(ns, admin)
					return err
				}, "administration to be reached in audit from "+name)
			}
			guard(workload.GuardEnforce)
			a.wantGuard(t, workload.GuardEnforce)
			for name, ns := range from {
				before := a.counted(t, bpfmap.RefusedGuard)
				if status, err := ready(ns, admin); !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("administration from %s = %q, %v; want ECONNREFUSED", name, status, err)
				}
				if a.counted(t, bpfmap.RefusedGuard) == before {
					t.Errorf("a dial from %s was not counted as refused", name)
				}
			}
			if status, err := ready(a.ns, admin); err != nil || status != "LIVE" {
				t.Errorf("administration from inside = %q, %v", status, err)
			}
		})
	}
}

// In enforce, who scrapes Envoy from outside reaches the ports that its
// registration names for that, in either mode, and no port that it does not name.
func TestGuardLeavesMetricsOpen(t *testing.T) {
	n := newMeshNode(t, false)
	n.config.Guard.Default = string(workload.GuardEnforce)
	n.runAgent()
	neighbour := n.allocate("")
	for _, mode := range []string{"direct", "transparent"} {
		t.Run(mode, func(t *testing.T) {
			mesh := ""
			if mode == "transparent" {
				mesh = meshRequest
			}
			a := n.allocate(mesh)
			register := func(config object) (proxyID string) {
				return a.register(mode, object{"Port": 20002, "Proxy": object{"Mode": mode, "Config": config}})
			}
			ports := map[string]uint16{"envoy_prometheus_bind_addr": 9102, "envoy_stats_bind_addr": 9103}
			paths := map[string]string{"envoy_prometheus_bind_addr": "/metrics", "envoy_stats_bind_addr": "/stats"}
			named := object{}
			for key, port := range ports {
				named[key] = fmt.Sprintf("0.0.0.0:%d", port)
			}
			a.startEnvoy(register(named))
			scrape := func(ns *test.NetNS, key string) error {
				text, err := get(client(ns), fmt.Sprintf("http://%s%s", a.at(ports[key]), paths[key]))
				if err == nil && !strings.Contains(text, "server") {
					err = fmt.Errorf("it answers %q", text)
				}
				return err
			}
			for what, ns := range map[string]*test.NetNS{"the host": n.outside, "a neighbour": neighbour.ns} {
				for key := range ports {
					test.Eventually(t, func() error { return scrape(ns, key) }, fmt.Sprintf("%s to be scraped from %s", key, what))
				}
			}
			for key, port := range ports { // Envoy listens at both all the while
				register(object{key: named[key]})
				a.eventually("one port alone", func(o workload.MeshConfig) bool { return slices.Equal(o.ExposedPorts, []uint16{port}) })
				for other := range ports {
					if err := scrape(n.outside, other); (err == nil) != (other == key) {
						t.Errorf("with %s alone registered, %s answers the host: %v", key, other, err)
					}
				}
			}
		})
	}
}

// routeLoopback makes Envoy's loopback address one that the host and a neighbour
// reach in the allocation.
func (a *meshAlloc) routeLoopback(t *testing.T, neighbour *meshAlloc) {
	t.Helper()
	addr := netip.MustParseAddrPort(sidecarAdmin).Addr().String()
	for _, hop := range []struct {
		ns  *test.NetNS
		via netip.Addr
	}{{a.node.outside, a.addr}, {neighbour.ns, neighbour.gate}, {a.ns, netip.Addr{}}} {
		hop.ns.Do(func() {
			for _, setting := range []string{"conf/all/route_localnet", "conf/default/route_localnet"} {
				if err := os.WriteFile("/proc/sys/net/ipv4/"+setting, []byte("1"), 0o644); err != nil {
					t.Error(err)
				}
			}
		})
		if !hop.via.IsValid() {
			continue
		}
		ip(t, hop.ns, "rule add pref 100 lookup local")
		ip(t, hop.ns, "rule del pref 0 lookup local")
		ip(t, hop.ns, "rule add pref 10 to %s lookup 77", addr)
		ip(t, hop.ns, "route add %s via %s table 77", addr, hop.via)
	}
}

// wantGuard waits until the kernel has the guard.
func (a *meshAlloc) wantGuard(t *testing.T, want workload.Guard) {
	t.Helper()
	a.eventually("the guard", func(o workload.MeshConfig) bool { return o.Guard == want })
	if w, err := a.workload(); err != nil || w.Guard != want || len(w.Problems) > 0 {
		t.Fatalf("the kernel has %+v, %v; want guard %s without problems", w, err, want)
	}
}

// counted is how often a verdict was reached in the allocation.
func (a *meshAlloc) counted(t *testing.T, verdict bpfmap.Verdict) uint64 {
	t.Helper()
	list, err := a.node.Verdicts()
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range list {
		if w.Key.ContainerID == a.id {
			return w.Counts[verdict.String()]
		}
	}
	t.Fatalf("no counters of allocation %s", a.id)
	return 0
}
