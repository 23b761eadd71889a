// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/test"
)

// answered fails the test unless the proxy answered, with the origin that was
// dialled, and both sides saw the addresses that they should.
func (a *alloc) answered(answer test.Answer, err error, origin netip.AddrPort, source netip.Addr) {
	t := a.node.t
	t.Helper()
	if err != nil {
		t.Fatalf("dial %s: %v", origin, err)
	}
	if answer.Server != a.outbound.Name {
		t.Errorf("dial %s: %s answered, want the proxy %s", origin, answer.Server, a.outbound.Name)
	}
	if answer.Origin != origin {
		t.Errorf("dial %s: the proxy saw origin %s", origin, answer.Origin)
	}
	if answer.To != origin {
		t.Errorf("dial %s: getpeername says %s", origin, answer.To)
	}
	if answer.From.Addr() != source || answer.Peer != answer.From {
		t.Errorf("dial %s: getsockname says %s, the proxy saw %s, want %s", origin, answer.From, answer.Peer, source)
	}
}

func TestOutbound(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	for _, origin := range []string{"10.9.1.1:80", "240.0.0.1:8080", "8.8.8.8:15001", "192.0.2.77:20000"} {
		moved := a.rose(func() {
			answer, err := a.ask("tcp4", origin)
			a.answered(answer, err, netip.MustParseAddrPort(origin), a.v4)
		})
		if diff := cmp.Diff(map[Verdict]uint64{Redirected: 1}, moved); diff != "" {
			t.Errorf("dial %s: verdicts (-want +got):\n%s", origin, diff)
		}
	}
}

func TestOutboundIPv6ToIPv4Proxy(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	origin := netip.AddrPortFrom(remote6(1), 80)
	answer, err := a.ask("tcp", origin.String())
	a.answered(answer, err, origin, a.v4)
}

func TestOutboundRefusedWithoutProxy(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	// Something listens on the very port that is dialled, and on the remote.
	a.serve(taskUID, a.taskCg, "tcp4", "0.0.0.0:8080")
	test.Echo(t, n.remote, "tcp", "0.0.0.0:8080")
	moved := a.rose(func() {
		if _, err := a.ask("tcp4", "10.9.1.1:8080"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial without a proxy: %v, want connection refused", err)
		}
	})
	if diff := cmp.Diff(map[Verdict]uint64{Redirected: 1, RefusedNoProxy: 1}, moved); diff != "" {
		t.Errorf("verdicts (-want +got):\n%s", diff)
	}
}
