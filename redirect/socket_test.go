// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"net/netip"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// somewhere is a destination that only the proxy can serve.
const somewhere = "192.0.2.77:8080"

// moves fails the test unless action moves exactly these counters.
func (a *alloc) moves(t *testing.T, want map[bpfmap.Verdict]uint64, action func()) {
	t.Helper()
	if diff := cmp.Diff(want, a.rose(action)); diff != "" {
		t.Errorf("verdicts (-want +got):\n%s", diff)
	}
}

// proxied runs a script that ends with an answer, which must be the proxy's.
func (a *alloc) proxied(t *testing.T, p actor, s script, origin string, source netip.Addr) outcome {
	t.Helper()
	var last outcome
	a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.Redirected: 1}, func() {
		last = p.last(t, s)
		a.answered(last.Answer, nil, netip.MustParseAddrPort(origin), source)
	})
	return last
}

// proxiedAlloc is an allocation under Weir with its proxy on IPv4.
func proxiedAlloc(t *testing.T, change ...func(*workload.Request)) *alloc {
	t.Helper()
	a := newNode(t).newAlloc()
	a.add(change...)
	a.startProxy()
	return a
}

func TestSocketKinds(t *testing.T) {
	a := proxiedAlloc(t)
	p := a.task(t)
	loopback, other := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.5")
	own := a.v4.String()
	for _, tc := range []struct {
		name   string
		script script
		source netip.Addr
		port   uint16 // of the source; 0: any
	}{
		{"blocking", stream(unix.AF_INET).connect(somewhere), a.v4, 0},
		{"non-blocking", stream(unix.AF_INET).to("connectLater", somewhere), a.v4, 0},
		{"bound to any address and a port", stream(unix.AF_INET).bind("0.0.0.0:4001").connect(somewhere), a.v4, 4001},
		{"bound to its address", stream(unix.AF_INET).bind(own + ":0").connect(somewhere), a.v4, 0},
		{"bound to its address and a port", stream(unix.AF_INET).bind(own + ":4002").connect(somewhere), a.v4, 4002},
		{"bound to its address, the port later",
			stream(unix.AF_INET).set(unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1).bind(own + ":0").connect(somewhere), a.v4, 0},
		{"bound to loopback", stream(unix.AF_INET).bind("127.0.0.1:0").connect(somewhere), loopback, 0},
		{"bound to another loopback address", stream(unix.AF_INET).bind("127.0.0.5:4003").connect(somewhere), other, 4003},
		{"bound, non-blocking", stream(unix.AF_INET).bind(own+":4004").to("connectLater", somewhere), a.v4, 4004},
		{"MPTCP", script(nil).open(unix.AF_INET, unix.IPPROTO_MPTCP).connect(somewhere), a.v4, 0},
		{"MPTCP, non-blocking", script(nil).open(unix.AF_INET, unix.IPPROTO_MPTCP).to("connectLater", somewhere), a.v4, 0},
		{"MPTCP on a dual-stack socket", script(nil).open(unix.AF_INET6, unix.IPPROTO_MPTCP).connect(somewhere), a.v4, 0},
		{"port of the proxy", stream(unix.AF_INET).connect("192.0.2.77:15001"), a.v4, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			origin := tc.script[len(tc.script)-1].Addr.String()
			got := a.proxied(t, p, tc.script.ask(""), origin, tc.source)
			if tc.port != 0 && got.Answer.From.Port() != tc.port {
				t.Errorf("source port = %d, want %d", got.Answer.From.Port(), tc.port)
			}
		})
	}
}

// setSysctlIn sets a kernel parameter of the namespace.
func setSysctlIn(t *testing.T, ns *test.NetNS, path, value string) {
	t.Helper()
	ns.Do(func() {
		if err := os.WriteFile("/proc/sys/net/"+path, []byte(value), 0); err != nil {
			t.Fatalf("set kernel parameter: %v", err)
		}
	})
}

func TestSocketFastOpen(t *testing.T) {
	a := newNode(t).newAlloc()
	a.add()
	// Both sides send and take data in the SYN, without a cookie of an earlier
	// connection, on every listener.
	const client, server, clientNoCookie, serverNoCookie, everyListener = 1, 2, 4, 0x200, 0x400
	setSysctlIn(t, a.NetNS, "ipv4/tcp_fastopen", fmt.Sprint(client|server|clientNoCookie|serverNoCookie|everyListener))
	a.startProxy()
	p := a.task(t)
	const hello = "hello, mesh"
	for _, tc := range []struct {
		name   string
		script script
	}{
		{"MSG_FASTOPEN", stream(unix.AF_INET).to("connectByData", somewhere).data(hello)},
		{"TCP_FASTOPEN_CONNECT", stream(unix.AF_INET).set(unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1).
			connect(somewhere).do(step{Do: "write", Text: hello})},
		{"MSG_FASTOPEN on a dual-stack socket", stream(unix.AF_INET6).to("connectByData", somewhere).data(hello)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := a.proxied(t, p, tc.script.ask(hello), somewhere, a.v4)
			if got.Echo != hello {
				t.Errorf("echo = %q, want %q", got.Echo, hello)
			}
			if !got.SynData {
				t.Error("the data did not go with the SYN: this was no fast open")
			}
		})
	}
}

func TestSocketIOUring(t *testing.T) {
	test.Need(t, test.IOUring)
	a := proxiedAlloc(t)
	p := a.task(t)
	for _, how := range []string{"connectByRing", "connectByWorker", "connectByThread"} {
		t.Run(how, func(t *testing.T) {
			a.proxied(t, p, stream(unix.AF_INET).to(how, somewhere).ask(""), somewhere, a.v4)
			a.proxied(t, p, stream(unix.AF_INET6).to(how, "[2001:db8::1]:443").ask(""), "[2001:db8::1]:443", a.v4)
			a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedEncoded: 1}, func() {
				p.run(t, stream(unix.AF_INET).to(how, "127.128.0.1:80").fails(unix.ECONNREFUSED))
			})
		})
	}
}

func TestSocketConnectsAgainAfterRefusal(t *testing.T) {
	a := newNode(t).newAlloc()
	a.add()
	p := a.task(t)
	a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedNoProxy: 1}, func() {
		p.run(t, stream(unix.AF_INET).connect(somewhere).fails(unix.ECONNREFUSED))
	})
	a.startProxy()
	again := script{{Do: "connect", Addr: netip.MustParseAddrPort(somewhere)}}.ask("")
	a.proxied(t, p, again, somewhere, a.v4)
}

func TestSocketConnectsElsewhereAfterRefusal(t *testing.T) {
	a := proxiedAlloc(t)
	p := a.task(t)
	a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedEncoded: 1, bpfmap.Redirected: 1}, func() {
		got := p.last(t, stream(unix.AF_INET).connect("127.200.0.1:80").fails(unix.ECONNREFUSED).connect(somewhere).ask(""))
		a.answered(got.Answer, nil, netip.MustParseAddrPort(somewhere), a.v4)
	})
}

// A socket that is connected stays what it is, whatever else it asks for.
func TestSocketConnectsTwice(t *testing.T) {
	a := proxiedAlloc(t)
	p := a.task(t)
	got := a.proxied(t, p, stream(unix.AF_INET).connect(somewhere).
		connect("192.0.2.78:80").fails(unix.EISCONN).ask(""), somewhere, a.v4)
	if want := netip.MustParseAddrPort(somewhere); got.Answer.To != want {
		t.Errorf("getpeername = %s, want %s", got.Answer.To, want)
	}
}

func TestSocketReconnectsAfterDisconnect(t *testing.T) {
	a := proxiedAlloc(t)
	local := a.serve(taskUID, a.taskCg, "tcp4", "127.0.0.1:9000")
	p := a.task(t)
	const second = "198.51.100.3:443"
	a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.Redirected: 2, bpfmap.Local: 1}, func() {
		got := p.run(t, stream(unix.AF_INET).connect(somewhere).ask("").
			disconnect().connect(second).ask("").
			disconnect().connect(local.Addr.String()).ask(""))
		a.answered(got[2].Answer, nil, netip.MustParseAddrPort(somewhere), a.v4)
		a.answered(got[5].Answer, nil, netip.MustParseAddrPort(second), a.v4)
		direct(t, got[8].Answer, local.Name, local.Addr)
	})
}

// direct fails the test unless that server answered at the address, and
// nothing on the way was changed.
func direct(t *testing.T, got test.Answer, server string, addr netip.AddrPort) {
	t.Helper()
	if got.Server != server {
		t.Errorf("dial %s: %q answered, want %q", addr, got.Server, server)
	}
	if got.Local != addr || got.To != addr {
		t.Errorf("dial %s: the server saw it come in on %s, getpeername says %s", addr, got.Local, got.To)
	}
	if got.Peer != got.From {
		t.Errorf("dial %s: the server saw %s, getsockname says %s", addr, got.Peer, got.From)
	}
	if got.Origin.IsValid() {
		t.Errorf("dial %s: SO_ORIGINAL_DST says %s without a redirect", addr, got.Origin)
	}
}

// A socket bound to a device does not reach the proxy: on eth0 it cannot, on lo
// its packets would come back from an address that lo does not have.
func TestSocketBoundToDevice(t *testing.T) {
	a := proxiedAlloc(t)
	remote := test.Echo(t, a.node.remote, "tcp", addrPort(remote4(1), 8080))
	p := a.task(t)
	for _, device := range []string{"eth0", "lo"} {
		t.Run(device, func(t *testing.T) {
			a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedDevice: 1}, func() {
				p.run(t, stream(unix.AF_INET).device(device).connect(remote.Addr.String()).fails(unix.ENETUNREACH))
			})
		})
	}
}

func TestSocketWithMark(t *testing.T) {
	a := proxiedAlloc(t)
	p := a.actor(t, 0, a.taskCg)
	a.proxied(t, p, stream(unix.AF_INET).set(unix.SOL_SOCKET, unix.SO_MARK, 0x2a).connect(somewhere).ask(""), somewhere, a.v4)
}
