// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// verdictCase makes something real of which a program decides so. It returns whose it is,
// and what "weir explain" is asked for after the allocation where that explains such: a
// connection over TCP without options.
type verdictCase func(v verdictScene) (a *alloc, explain []string)

// verdictScene is where the cases happen: a node that most of them share.
type verdictScene struct {
	*node
	t *testing.T
}

// add puts a new allocation under Weir, as the request and the mesh configuration say.
func (v verdictScene) add(meshConfig workload.MeshConfig, change ...func(*workload.Request)) *alloc {
	v.t.Helper()
	a := v.newAlloc()
	a.add(change...)
	if err := v.SetMeshConfig(a.key, meshConfig); err != nil {
		v.t.Fatal(err)
	}
	return a
}

// proxied has a proxy that listens.
func (v verdictScene) proxied(change ...func(*workload.Request)) *alloc {
	v.t.Helper()
	a := v.add(workload.MeshConfig{}, change...)
	a.startProxy()
	return a
}

// own is a node of the case's own, for what would concern the others.
func (v verdictScene) own() verdictScene { return verdictScene{newNode(v.t), v.t} }

// connect has a task connect and end with the errno.
func (v verdictScene) connect(a *alloc, to string, errno syscall.Errno) {
	v.t.Helper()
	domain := unix.AF_INET
	if netip.MustParseAddrPort(to).Addr().Is6() {
		domain = unix.AF_INET6
	}
	a.task(v.t).run(v.t, stream(domain).connect(to).fails(errno))
}

// fromOutside dials a port of the allocation from the remote.
func (v verdictScene) fromOutside(a *alloc, network string, port uint16, refused bool) {
	v.t.Helper()
	_, err := test.Ask(v.remote, network, addrPort(a.v4, port))
	if refused != errors.Is(err, syscall.ECONNREFUSED) || !refused && err != nil {
		v.t.Errorf("dial port %d from outside: %v, want it refused: %v", port, err, refused)
	}
}

func inMode(mode workload.Mode) func(*workload.Request) {
	return func(r *workload.Request) { r.Mode = mode }
}

const elsewhere4 = "192.0.2.1:80"

// outboundCases are of what an allocation's task dials.
func outboundCases() map[bpfmap.Verdict]verdictCase {
	far := func(a *alloc) string { return addrPort(remote4(a.number), 80) }
	return map[bpfmap.Verdict]verdictCase{
		bpfmap.Redirected: func(v verdictScene) (*alloc, []string) {
			a := v.proxied()
			v.connect(a, elsewhere4, 0)
			return a, []string{elsewhere4}
		},
		bpfmap.Proxy: func(v verdictScene) (*alloc, []string) {
			a := v.proxied()
			a.actor(v.t, proxyUID, a.proxyCg).run(v.t, stream(unix.AF_INET).connect(far(a)))
			return a, nil
		},
		bpfmap.UIDExcluded: func(v verdictScene) (*alloc, []string) {
			a := v.proxied(func(r *workload.Request) { r.ExcludeUIDs = []uint32{outcomeUID} })
			a.actor(v.t, outcomeUID, a.taskCg).run(v.t, stream(unix.AF_INET).connect(far(a)))
			return a, []string{far(a), "-uid", fmt.Sprint(outcomeUID)}
		},
		bpfmap.Local: func(v verdictScene) (*alloc, []string) {
			a := v.proxied()
			v.connect(a, "127.0.0.1:9", unix.ECONNREFUSED) // as without a mesh
			return a, []string{"127.0.0.1:9"}
		},
		bpfmap.ToUpstream: func(v verdictScene) (*alloc, []string) {
			a := v.add(workload.MeshConfig{Upstreams: []workload.Upstream{
				{Name: "db", Addresses: test.Addrs("240.0.0.5"), Listener: netip.MustParseAddrPort("127.0.0.1:9191")},
			}})
			a.serve(proxyUID, a.proxyCg, "tcp4", "127.0.0.1:9191")
			v.connect(a, "240.0.0.5:80", 0)
			return a, []string{"db:80"}
		},
		bpfmap.PortExcluded: func(v verdictScene) (*alloc, []string) {
			a := v.proxied(func(r *workload.Request) { r.ExcludeOutboundPorts = []uint16{80} })
			v.connect(a, far(a), 0)
			return a, []string{far(a)}
		},
		bpfmap.CIDRExcluded: func(v verdictScene) (*alloc, []string) {
			a := v.proxied(func(r *workload.Request) {
				r.ExcludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}
			})
			v.connect(a, far(a), 0)
			return a, []string{far(a)}
		},
		bpfmap.Direct: func(v verdictScene) (*alloc, []string) {
			a := v.add(workload.MeshConfig{}, inMode(workload.ModeDirect))
			v.connect(a, far(a), 0)
			return a, []string{far(a)}
		},
		bpfmap.ToDNS: func(v verdictScene) (*alloc, []string) {
			a := v.newAlloc()
			a.add(func(r *workload.Request) { r.DNS = workload.DNS{Address: remote4(a.number), Port: 80} })
			to := addrPort(remote4(a.number), 53)
			v.connect(a, to, 0)
			return a, []string{to}
		},
		bpfmap.UDP: func(v verdictScene) (*alloc, []string) {
			a := v.add(workload.MeshConfig{})
			if _, err := a.ask("udp", far(a)); err != nil {
				v.t.Error(err)
			}
			return a, nil
		},
		bpfmap.EgressAudited: func(v verdictScene) (*alloc, []string) {
			a := v.add(workload.MeshConfig{Egress: workload.GuardAudit}, inMode(workload.ModeDirect))
			v.connect(a, far(a), 0)
			return a, []string{far(a)}
		},
		bpfmap.RefusedEgress: func(v verdictScene) (*alloc, []string) {
			a := v.add(workload.MeshConfig{Egress: workload.GuardEnforce}, inMode(workload.ModeDirect))
			v.connect(a, far(a), unix.ENETUNREACH)
			return a, []string{far(a)}
		},
		bpfmap.EgressSocketAudited: func(v verdictScene) (*alloc, []string) { return v.rawSocket(workload.GuardAudit, 0), nil },
		bpfmap.RefusedEgressSocket: func(v verdictScene) (*alloc, []string) { return v.rawSocket(workload.GuardEnforce, unix.EPERM), nil },
		bpfmap.RefusedEncoded: func(v verdictScene) (*alloc, []string) {
			a := v.proxied()
			v.connect(a, "127.128.0.7:80", unix.ECONNREFUSED)
			return a, []string{"127.128.0.7:80"}
		},
		bpfmap.RefusedFamily: func(v verdictScene) (*alloc, []string) {
			a := v.add(workload.MeshConfig{})
			a.serve(proxyUID, a.proxyCg, "tcp6", "[::1]:15001")
			v.connect(a, elsewhere4, unix.ENETUNREACH)
			return a, []string{elsewhere4}
		},
		bpfmap.RefusedDevice: func(v verdictScene) (*alloc, []string) {
			a := v.proxied()
			a.task(v.t).run(v.t, stream(unix.AF_INET).device("eth0").connect("127.0.0.1:9").fails(unix.ENETUNREACH))
			return a, nil
		},
		bpfmap.RefusedOption: func(v verdictScene) (*alloc, []string) {
			a := v.proxied()
			a.actor(v.t, 0, a.taskCg).run(v.t, stream(unix.AF_INET).setBytes(unix.SOL_IP, unix.IP_OPTIONS, looseRoute(remote4(a.number))).fails(unix.ENOPROTOOPT))
			return a, nil
		},
		bpfmap.RefusedBroadcast: func(v verdictScene) (*alloc, []string) {
			a := v.proxied()
			v.connect(a, "224.0.0.1:80", unix.ENETUNREACH)
			return a, []string{"224.0.0.1:80"}
		},
		bpfmap.RefusedSource: func(v verdictScene) (*alloc, []string) {
			a := v.proxied()
			a.task(v.t).run(v.t, stream(unix.AF_INET6).set(unix.SOL_IPV6, unix.IPV6_FREEBIND, 1).bind("[2001:db8::99]:0").connect("[2001:db8::3]:80").fails(unix.ENETUNREACH))
			return a, nil
		},
		bpfmap.RefusedBudget: func(v verdictScene) (*alloc, []string) {
			a := v.proxied(func(r *workload.Request) { r.Budget = 1 })
			v.connect(a, elsewhere4, 0)
			v.connect(a, "192.0.2.2:80", unix.ENETUNREACH)
			return a, []string{"192.0.2.2:80"}
		},
		bpfmap.RefusedShare: func(v verdictScene) (*alloc, []string) {
			v = v.own()
			a := v.proxied()
			a.knock(netip.MustParseAddr("20.1.0.0"), bpfmap.OriginShare)
			v.others(bpfmap.DefaultOrigins)
			v.connect(a, elsewhere4, unix.ENETUNREACH)
			return a, []string{elsewhere4}
		},
		bpfmap.RefusedTable: func(v verdictScene) (*alloc, []string) {
			v = v.own()
			a := v.proxied()
			v.edit(func(tables *bpfmap.Tables) error { return tables.Delete("budgets", a.Cookie()) })
			v.connect(a, elsewhere4, unix.ENETUNREACH)
			return a, []string{elsewhere4}
		},
		bpfmap.RefusedNoProxy: func(v verdictScene) (*alloc, []string) {
			a := v.add(workload.MeshConfig{})
			v.connect(a, elsewhere4, unix.ECONNREFUSED)
			return a, []string{elsewhere4}
		},
	}
}

// rawSocket is an allocation whose root makes a socket that passes the proxy.
func (v verdictScene) rawSocket(egress workload.Guard, want syscall.Errno) *alloc {
	v.t.Helper()
	a := v.add(workload.MeshConfig{Egress: egress})
	var got syscall.Errno
	if err := a.attacker(v.t).Call(attack{Way: "raw udp", To: netip.AddrPortFrom(remote4(a.number), attackPort)}, &got); err != nil || got != want {
		v.t.Errorf("raw socket: %s, %v; want %s", errnoName(got), err, errnoName(want))
	}
	return a
}

// inboundCases are of what comes from outside, or passes through.
func inboundCases() map[bpfmap.Verdict]verdictCase {
	guarded := func(v verdictScene, guard workload.Guard, network string, port uint16, refused bool) *alloc {
		a := v.add(workload.MeshConfig{Guard: guard}, inMode(workload.ModeDirect))
		a.serve(taskUID, a.taskCg, network, fmt.Sprintf("[::]:%d", port))
		v.fromOutside(a, network, port, refused)
		return a
	}
	inbound := []string{"-inbound", "8080"}
	return map[bpfmap.Verdict]verdictCase{
		bpfmap.Inbound: func(v verdictScene) (*alloc, []string) {
			a := v.proxied()
			v.fromOutside(a, "tcp", 8080, false)
			return a, inbound
		},
		bpfmap.InboundExcluded: func(v verdictScene) (*alloc, []string) {
			a := v.proxied(func(r *workload.Request) { r.ExcludeInboundPorts = []uint16{8080} })
			a.serve(taskUID, a.taskCg, "tcp", "[::]:8080")
			v.fromOutside(a, "tcp", 8080, false)
			return a, inbound
		},
		bpfmap.GuardAudited: func(v verdictScene) (*alloc, []string) {
			return guarded(v, workload.GuardAudit, "tcp", 8080, false), inbound
		},
		bpfmap.GuardEphemeral: func(v verdictScene) (*alloc, []string) {
			return guarded(v, workload.GuardEnforce, "udp", 40000, false), nil
		},
		bpfmap.RefusedGuard: func(v verdictScene) (*alloc, []string) {
			return guarded(v, workload.GuardEnforce, "tcp", 8080, true), inbound
		},
		bpfmap.RefusedInboundNoProxy: func(v verdictScene) (*alloc, []string) {
			a := v.add(workload.MeshConfig{})
			v.fromOutside(a, "tcp", 8080, true)
			return a, inbound
		},
		bpfmap.RefusedInboundUnknown: func(v verdictScene) (*alloc, []string) {
			a := v.add(workload.MeshConfig{}, func(r *workload.Request) { r.InboundPort = 0 })
			v.fromOutside(a, "tcp", 8080, true)
			return a, inbound
		},
		bpfmap.Forwarded: func(v verdictScene) (*alloc, []string) {
			a := v.add(workload.MeshConfig{Guard: workload.GuardAudit}, inMode(workload.ModeDirect))
			if _, err := test.Ask(a.newInner(), "tcp", addrPort(remote4(a.number), 80)); err != nil {
				v.t.Errorf("dial through the allocation: %v", err)
			}
			return a, nil
		},
		bpfmap.RefusedForwarded: func(v verdictScene) (*alloc, []string) {
			a := v.own().add(workload.MeshConfig{})
			if _, err := test.Ask(a.newInner(), "tcp", addrPort(remote4(a.number), 80)); !errors.Is(err, syscall.ECONNREFUSED) {
				v.t.Errorf("dial through the allocation: %v, want it refused", err)
			}
			return a, nil
		},
	}
}

// listenerCases are of what listens on the ports of the proxy.
func listenerCases() map[bpfmap.Verdict]verdictCase {
	return map[bpfmap.Verdict]verdictCase{
		bpfmap.Listener: func(v verdictScene) (*alloc, []string) { return v.proxied(), nil },
		bpfmap.RefusedListenerIdentity: func(v verdictScene) (*alloc, []string) {
			a := v.add(workload.MeshConfig{})
			a.sockets(taskUID, a.taskCg).mustListen("task", outboundListener)
			return a, nil
		},
		bpfmap.RefusedListenerAddress: func(v verdictScene) (*alloc, []string) {
			a := v.add(workload.MeshConfig{})
			a.sockets(proxyUID, a.proxyCg).mustListen("proxy", "127.0.0.2:15001")
			return a, nil
		},
		bpfmap.RefusedListenerTable: func(v verdictScene) (*alloc, []string) {
			a := v.add(workload.MeshConfig{})
			proxy := a.sockets(proxyUID, a.proxyCg)
			for i := range bpfmap.ListenerSlots + 1 {
				proxy.mustListen(fmt.Sprint("worker ", i), outboundListener, reusePort())
			}
			return a, nil
		},
		// The queue of the listener is full, so that the first packet of the last dial is
		// dropped. When it is sent again, after a second, the listener is closed.
		bpfmap.ListenerGone: func(v verdictScene) (*alloc, []string) {
			a := v.add(workload.MeshConfig{})
			proxy, task := a.actor(v.t, proxyUID, a.proxyCg), a.task(v.t)
			proxy.run(v.t, stream(unix.AF_INET).bind(outboundListener).listen())
			const queue = 16 + 1 // as listen has it
			for i := range queue + 1 {
				task.run(v.t, script(nil).on(fmt.Sprint(i)).open(unix.AF_INET, unix.IPPROTO_TCP).to("connectStart", elsewhere4).fails(unix.EINPROGRESS))
			}
			proxy.run(v.t, script(nil).open(unix.AF_INET, unix.IPPROTO_TCP)) // closes the one before
			test.Eventually(v.t, func() error {
				if counts := a.counts(); counts[bpfmap.ListenerGone] == 0 {
					return fmt.Errorf("verdicts are %v", counts)
				}
				return nil
			}, "the packet to be sent again")
			return a, nil
		},
	}
}

// Each verdict there is happens for real, and the program that operators have names it: it
// counts it for the allocation, and it explains such a connection so.
func TestEachVerdictIsNamed(t *testing.T) {
	n := newNode(t)
	weir := buildWeir(t)
	for _, network := range []string{"tcp", "udp"} {
		test.Echo(t, n.remote, network, "[::]:80")
	}
	cases := outboundCases()
	for _, more := range []map[bpfmap.Verdict]verdictCase{inboundCases(), listenerCases()} {
		for verdict, c := range more {
			cases[verdict] = c
		}
	}
	for _, verdict := range bpfmap.AllVerdicts() {
		t.Run(verdict.String(), func(t *testing.T) {
			happen := cases[verdict]
			if happen == nil {
				t.Fatal("nothing in this test makes the verdict happen")
			}
			a, explain := happen(verdictScene{n, t})
			run := func(into any, args ...string) {
				t.Helper()
				command := exec.Command(weir, args...)
				paths := a.node.Paths()
				command.Env = append(os.Environ(), "WEIR_PIN_DIR="+paths.PinDir, "WEIR_STATE_DIR="+paths.StateDir, "WEIR_CGROUP_ROOT="+paths.CgroupRoot)
				out, err := command.Output() // the exit code of explain is 2 where the connection would fail
				if failed := json.Unmarshal(out, into); failed != nil {
					t.Fatalf("weir %q: %v, %v: %s", args, err, failed, out)
				}
			}
			var counted struct {
				Workloads []struct{ Counts map[string]uint64 }
			}
			run(&counted, "verdicts", "-json", a.key.ContainerID)
			if len(counted.Workloads) != 1 || counted.Workloads[0].Counts[verdict.String()] == 0 {
				t.Errorf("weir verdicts: %+v, want %s among them", counted, verdict)
			}
			if explain == nil {
				return
			}
			var explained struct {
				Verdict string
				Refused bool
			}
			run(&explained, append([]string{"explain", "-json", a.key.ContainerID}, explain...)...)
			if explained.Verdict != verdict.String() || explained.Refused != verdict.Refused() {
				t.Errorf("weir explain %q: %+v, want %s", explain, explained, verdict)
			}
		})
	}
}

// buildWeir is the program as it is built. Where there is no Go, WEIR_TEST_BIN has it.
func buildWeir(t *testing.T) string {
	t.Helper()
	if built := os.Getenv("WEIR_TEST_BIN"); built != "" {
		return filepath.Join(built, "weir")
	}
	test.Need(t, test.Tool("go"))
	path := filepath.Join(t.TempDir(), "weir")
	build := exec.Command("go", "build", "-trimpath", "-o", path, "github.com/weirmesh/weir/cmd/weir")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build weir: %v\n%s", err, out)
	}
	return path
}
