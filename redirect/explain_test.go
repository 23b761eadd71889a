// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/explain"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// explained is a namespace whose configuration and listeners change at random, and what dials there.
type explained struct {
	*alloc
	t       *testing.T
	random  *rand.Rand
	tables  *bpfmap.Tables
	proxy   actor // owns the listeners
	dialers []dialer
	outside actor
	seen    map[bpfmap.Verdict]int
}

// dialer is a process of the allocation with what the rules look at.
type dialer struct {
	actor
	uid    uint32
	cgroup uint64
}

const (
	explainedUID      = 2000
	explainedPort     = 9001
	explainedOpen     = 9000
	explainedExposed  = 9102
	explainedUpstream = 9191
	explainedDNS      = 8600
)

func newExplained(t *testing.T) *explained {
	n := newNode(t)
	a := n.newAlloc()
	tables, err := bpfmap.OpenTablesToRead(n.Paths().Maps())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tables.Close() })
	x := &explained{alloc: a, t: t, tables: tables, seen: make(map[bpfmap.Verdict]int)}
	x.proxy = a.actor(t, proxyUID, a.proxyCg)
	for _, who := range []struct {
		uid    uint32
		cgroup *test.Cgroup
	}{{taskUID, a.taskCg}, {proxyUID, a.taskCg}, {proxyUID, a.proxyCg}, {taskUID, a.proxyCg}, {explainedUID, a.taskCg}, {0, a.taskCg}} {
		x.dialers = append(x.dialers, dialer{actor: a.actor(t, who.uid, who.cgroup), uid: who.uid, cgroup: who.cgroup.ID})
	}
	x.outside = actor{test.Helper(t, test.Spec{NetNS: n.remote}, scriptFunc)}
	return x
}

func (x *explained) chance(percent int) bool { return x.random.IntN(100) < percent }

func pick[T any](x *explained, list ...T) T { return list[x.random.IntN(len(list))] }

// configure puts the namespace under Weir with another configuration than before.
func (x *explained) configure(again bool) {
	var closing script
	for _, name := range []string{"out", "out6", "in", "second", "exposed", "upstream"} {
		closing = closing.on(name).open(unix.AF_INET6, unix.IPPROTO_TCP)
	}
	x.proxy.run(x.t, closing)
	if again {
		if err := x.node.Remove(x.key); err != nil {
			x.t.Fatal(err)
		}
	}
	x.add(func(r *workload.Request) {
		r.Mode = pick(x, workload.ModeTransparent, workload.ModeTransparent, workload.ModeTransparent, workload.ModeTransparent, workload.ModeDirect, workload.ModeGateway)
		r.DNS = pick(x, workload.DNS{}, workload.DNS{}, workload.DNS{Port: explainedDNS}, workload.DNS{Address: netip.MustParseAddr("127.0.0.1")}, workload.DNS{Address: netip.IPv6Loopback(), Port: explainedDNS})
		r.InboundPort = pick(x, inboundPort, inboundPort, inboundPort, uint16(0))
		if x.chance(40) {
			r.ExcludeUIDs = []uint32{explainedUID}
		}
		if x.chance(40) {
			r.ExcludeOutboundPorts = []uint16{explainedPort, 65535}
		}
		if x.chance(40) {
			r.ExcludeInboundPorts = []uint16{explainedOpen}
		}
		if x.chance(40) {
			r.ExcludeOutboundCIDRs = []netip.Prefix{pick(x,
				netip.MustParsePrefix("198.51.100.0/25"), netip.MustParsePrefix("::/0"), netip.MustParsePrefix("0.0.0.0/1"), netip.MustParsePrefix("fd09::/16"))}
		}
		r.Budget = pick(x, 0, 0, 4, uint32(12))
	})
	guards := []workload.Guard{workload.GuardOff, workload.GuardAudit, workload.GuardEnforce}
	meshConfig := workload.MeshConfig{Guard: pick(x, guards...), Egress: pick(x, guards...)}
	if x.chance(50) {
		meshConfig.Upstreams = []workload.Upstream{{Name: "db", Addresses: test.Addrs("240.0.0.5", "fd09:1::5"),
			Listener: netip.AddrPortFrom(pick(x, netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()), explainedUpstream)}}
	}
	if x.chance(40) {
		meshConfig.ExposedPorts = []uint16{explainedExposed}
	}
	if x.chance(40) {
		meshConfig.Service = "api"
		meshConfig.Proxies = []workload.Sidecar{{Service: "web", InboundPort: secondInbound, OutboundPort: secondOutbound,
			ServicePorts: []uint16{8081}, VirtualIPs: test.Addrs("240.0.1.1", "fd09:1::6")}}
	}
	if err := x.node.SetMeshConfig(x.key, meshConfig); err != nil {
		x.t.Fatal(err)
	}
	x.listen()
}

// listen opens some of the proxy's listeners. They are never accepted from: there is room for all.
func (x *explained) listen() {
	var listening script
	open := func(name string, domain int, addr string, only6 int) {
		listening = listening.on(name).open(domain, unix.IPPROTO_TCP).set(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		if domain == unix.AF_INET6 {
			listening = listening.set(unix.SOL_IPV6, unix.IPV6_V6ONLY, only6)
		}
		listening = listening.bind(addr).do(step{Do: "listen", Args: [3]int{4096}})
	}
	switch x.random.IntN(6) {
	case 0, 1:
		open("out", unix.AF_INET, "127.0.0.1:15001", 0)
	case 2:
		open("out6", unix.AF_INET6, "[::1]:15001", 1)
	case 3:
		open("out", unix.AF_INET, "127.0.0.1:15001", 0)
		open("out6", unix.AF_INET6, "[::1]:15001", 1)
		if x.chance(60) { // both were seen, and one of them has gone
			listening = listening.on(pick(x, "out", "out6")).open(unix.AF_INET6, unix.IPPROTO_TCP)
		}
	case 4:
		open("out", unix.AF_INET6, "[::]:15001", 0)
	}
	switch x.random.IntN(4) {
	case 0:
		open("in", unix.AF_INET, "0.0.0.0:20000", 0)
	case 1:
		open("in", unix.AF_INET6, "[::]:20000", 0)
	case 2:
		open("in", unix.AF_INET6, "[::]:20000", 1)
	}
	if x.chance(50) {
		open("second", unix.AF_INET, fmt.Sprintf("127.0.0.1:%d", secondOutbound), 0)
	}
	if x.chance(50) {
		open("exposed", unix.AF_INET, fmt.Sprintf("0.0.0.0:%d", explainedExposed), 0)
	}
	x.proxy.run(x.t, listening)
}

// outbound is a random connection of one of the allocation's processes.
func (x *explained) outbound() (explain.Connection, dialer) {
	who := pick(x, x.dialers...)
	destination := netip.MustParseAddr(pick(x,
		"10.9.1.1", "fd09:1::1", "10.9.1.2", "fd09:1::2", "10.9.1.255", "127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "224.0.0.1", "ff0e::1",
		"255.255.255.255", "240.0.0.5", "fd09:1::5", "240.0.1.1", "fd09:1::6", "127.128.0.7", "fd77:6569:7200::7",
		"198.51.100.1", "198.51.100.127", "198.51.100.128", "203.0.113.7", "2001:db8::1", "8.8.8.8"))
	if x.chance(40) {
		destination = netip.AddrFrom4([4]byte{198, 51, 100, byte(x.random.IntN(256))})
	}
	port := pick(x, workload.DefaultDNSPort, 80, explainedPort, explainedPort+1024, 65535, 15001, inboundPort, explainedUpstream, uint16(1+x.random.IntN(65535)))
	return explain.Connection{
		Destination: netip.AddrPortFrom(destination, port), UID: who.uid, Cgroup: who.cgroup, IPv6Socket: destination.Is6() || x.chance(30),
	}, who
}

// inboundConnection is a random connection from the remote host.
func (x *explained) inboundConnection() explain.Connection {
	own, from := x.v4, remote4(x.number)
	if x.chance(50) {
		own, from = x.v6, remote6(x.number)
	}
	port := pick(x, 80, 8081, explainedOpen, explainedExposed, inboundPort, outboundPort, secondInbound, uint16(1+x.random.IntN(65535)))
	return explain.Connection{Destination: netip.AddrPortFrom(own, port), From: netip.AddrPortFrom(from, 1), UID: explain.NoUID}
}

func inboundVerdicts() []bpfmap.Verdict {
	return []bpfmap.Verdict{bpfmap.Inbound, bpfmap.InboundExcluded, bpfmap.GuardAudited, bpfmap.GuardEphemeral, bpfmap.RefusedInboundNoProxy, bpfmap.RefusedInboundUnknown, bpfmap.RefusedGuard}
}

// moved is which counters of the connection's direction a dial moved.
func (x *explained) moved(cookie uint64, inbound bool, dial func()) map[bpfmap.Verdict]uint64 {
	read := func() bpfmap.BpfVerdictCounts {
		var row bpfmap.BpfVerdictCounts
		if _, err := x.tables.Get("verdicts", cookie, &row); err != nil {
			x.t.Fatal(err)
		}
		return row
	}
	before := read()
	dial()
	after, moved := read(), make(map[bpfmap.Verdict]uint64)
	for i, count := range after.Count {
		if n := count - before.Count[i]; n > 0 && slices.Contains(inboundVerdicts(), bpfmap.Verdict(i)) == inbound {
			moved[bpfmap.Verdict(i)] = n
		}
	}
	return moved
}

// expectedCounts is what a verdict makes the kernel count.
func expectedCounts(verdict bpfmap.Verdict, inbound bool) map[bpfmap.Verdict]uint64 {
	if inbound && (verdict == bpfmap.Direct || verdict == bpfmap.Local || verdict == bpfmap.RefusedEncoded || verdict == bpfmap.RefusedTable) {
		return map[bpfmap.Verdict]uint64{}
	}
	return map[bpfmap.Verdict]uint64{verdict: 1}
}

// check dials for real, and fails the test where the kernel did not do as explained.
func (x *explained) check(cookie uint64, c explain.Connection, who actor) bool {
	rows, err := explain.ReadSnapshot(x.tables, cookie, c)
	if err != nil {
		x.t.Fatal(err)
	}
	steps, verdict := explain.Evaluate(rows, c)
	how := "connectStart"
	if c.Inbound() || verdict == bpfmap.Redirected || verdict == bpfmap.RefusedNoProxy {
		how = "connectLater" // what is counted on arrival has been counted when it ends
	}
	domain, dialled := unix.AF_INET, c.Destination
	if !c.IPv4Socket() {
		domain = unix.AF_INET6
	}
	var outcomes []outcome
	moved := x.moved(cookie, c.Inbound(), func() {
		if err := who.Call(stream(domain).to(how, dialled.String()), &outcomes); err != nil {
			x.t.Fatal(err)
		}
	})
	for _, v := range []bpfmap.Verdict{bpfmap.Inbound, bpfmap.InboundExcluded, bpfmap.GuardAudited} { // see verdictsAre
		if moved[v] > 1 {
			moved[v] = 1
		}
	}
	x.seen[verdict]++
	errno := outcomes[len(outcomes)-1].Errno
	want := syscall.Errno(0)
	if verdict == bpfmap.RefusedNoProxy {
		want = unix.ECONNREFUSED
	}
	diff := cmp.Diff(expectedCounts(verdict, c.Inbound()), moved)
	if diff == "" && (how == "connectStart" || c.Inbound() || errno == want) {
		return true
	}
	x.t.Errorf("%+v:\nexplained as %s by %+v\nthe kernel ended it with %s and counted (-explained +counted):\n%s", c, verdict, steps, errnoName(errno), diff)
	return false
}

// What explain says of a connection is what the kernel does with it, whatever the configuration, the
// destination, the UID, the cgroup and the family of the socket.
func TestExplainAgreesWithTheKernel(t *testing.T) {
	x := newExplained(t)
	cookie, failures := x.Cookie(), 0
	configurations := test.Scale(100)
	for i := range configurations {
		x.random = rand.New(rand.NewPCG(1, uint64(i)))
		x.configure(i > 0)
		for range 100 {
			c, who := x.outbound()
			process := who.actor
			if x.chance(30) {
				c, process = x.inboundConnection(), x.outside
			}
			if !x.check(cookie, c, process) {
				failures++
			}
			if failures > 5 {
				t.Fatalf("configuration %d: enough", i)
			}
		}
	}
	t.Logf("connections by verdict: %v", x.seen)
	for _, verdict := range []bpfmap.Verdict{bpfmap.Redirected, bpfmap.Proxy, bpfmap.UIDExcluded, bpfmap.Local, bpfmap.ToUpstream, bpfmap.PortExcluded, bpfmap.CIDRExcluded, bpfmap.Direct, bpfmap.ToDNS, bpfmap.Inbound, bpfmap.InboundExcluded,
		bpfmap.GuardAudited, bpfmap.EgressAudited, bpfmap.RefusedEgress, bpfmap.RefusedEncoded, bpfmap.RefusedFamily, bpfmap.RefusedBroadcast, bpfmap.RefusedBudget, bpfmap.RefusedNoProxy, bpfmap.RefusedInboundNoProxy, bpfmap.RefusedInboundUnknown, bpfmap.RefusedGuard} {
		if x.seen[verdict] == 0 && configurations >= 100 {
			t.Errorf("no connection was explained as %s: the test does not try enough", verdict)
		}
	}
}

// So it is where tables of the node are full, or rows of the workload are lost.
func TestExplainAgreesWhereRowsLack(t *testing.T) {
	for _, tc := range []struct {
		name  string
		spoil func(x *explained)
		want  bpfmap.Verdict
	}{
		{"the node's table of destinations is nearly full", func(x *explained) { x.node.others(bpfmap.DefaultOrigins) }, bpfmap.RefusedShare},
		{"the count of the workload's destinations is lost", func(x *explained) {
			x.node.edit(func(tables *bpfmap.Tables) error { return tables.Delete("budgets", x.Cookie()) })
		}, bpfmap.RefusedTable},
		{"its configuration is lost", func(x *explained) {
			x.node.edit(func(tables *bpfmap.Tables) error {
				generation, err := tables.Generation(x.Cookie())
				if err != nil {
					return err
				}
				return tables.Delete("configs", bpfmap.BpfConfigKey{Cookie: x.Cookie(), Generation: generation})
			})
		}, bpfmap.RefusedTable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			x := newExplained(t)
			x.add()
			x.startProxy()
			x.knock(netip.MustParseAddr("20.1.0.0"), bpfmap.OriginShare)
			tc.spoil(x)
			x.check(x.Cookie(), explain.Connection{Destination: netip.MustParseAddrPort("203.0.113.7:80"), UID: taskUID, Cgroup: x.taskCg.ID}, x.dialers[0].actor)
			if x.seen[tc.want] != 1 {
				t.Errorf("explained as %v, want %s", x.seen, tc.want)
			}
		})
	}
}
