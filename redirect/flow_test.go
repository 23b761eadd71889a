// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/json"
	"errors"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// unconnected is a UDP socket on a fixed port of the allocation that is never
// connected, as an NTP or a SIP client has it. It runs in the test's process.
func (a *alloc) unconnected(family int, port int, options ...func(fd int) error) int {
	t := a.node.t
	t.Helper()
	any := netip.IPv4Unspecified()
	if family == unix.AF_INET6 {
		any = netip.IPv6Unspecified()
	}
	var fd int
	var err error
	a.Do(func() {
		if fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return
		}
		for _, option := range options {
			err = errors.Join(err, option(fd))
		}
		timeout := unix.NsecToTimeval(int64(3 * time.Second))
		err = errors.Join(err, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
			unix.Bind(fd, sockaddr(fd, netip.AddrPortFrom(any, uint16(port)))))
	})
	if err != nil {
		t.Fatalf("open socket on port %d: %v", port, err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// answers sends a datagram by the socket and reports what an echo server there answers.
func answers(fd int, to netip.AddrPort) (reply test.Reply, err error) {
	if err := unix.Sendto(fd, []byte("?"), 0, sockaddr(fd, to)); err != nil {
		return reply, err
	}
	buffer := make([]byte, 4096)
	n, _, err := received(fd, buffer)
	if err != nil {
		return reply, err
	}
	return reply, json.Unmarshal(buffer[:n], &reply)
}

// A flow that began inside gets its answers, also where the socket is not
// connected and its port below the ephemeral range: the kernel asks sk_lookup
// for such an answer as for a datagram that nobody asked for.
func TestGuardLetsAnswersInToFixedPorts(t *testing.T) {
	for _, guard := range []workload.Guard{workload.GuardAudit, workload.GuardEnforce} {
		t.Run(string(guard), func(t *testing.T) {
			a := guarded(t, guard)
			test.Echo(t, a.node.remote, "udp", "[::]:9000")
			for _, tc := range []struct {
				name         string
				family, port int
				remote       netip.Addr
			}{
				{"IPv4", unix.AF_INET, 123, remote4(a.number)},
				{"IPv6", unix.AF_INET6, 5060, remote6(a.number)},
				{"mapped", unix.AF_INET6, 5061, netip.AddrFrom16(remote4(a.number).As16())},
			} {
				t.Run(tc.name, func(t *testing.T) {
					fd := a.unconnected(tc.family, tc.port)
					verdictsAre(t, a.rose(func() {
						for range 2 {
							if _, err := answers(fd, netip.AddrPortFrom(tc.remote, 9000)); err != nil {
								t.Errorf("answer to port %d: %v", tc.port, err)
							}
						}
					}), map[bpfmap.Verdict]uint64{})
				})
			}
		})
	}
}

// What nobody inside asked for is refused at the same port, also by a host that
// was asked from another port, or at another port of its.
func TestGuardRefusesWhatIsNoAnswer(t *testing.T) {
	a := guarded(t, workload.GuardEnforce)
	test.Echo(t, a.node.remote, "udp4", addrPort(remote4(a.number), 9000))
	fd := a.unconnected(unix.AF_INET, 123)
	if _, err := answers(fd, netip.AddrPortFrom(remote4(a.number), 9000)); err != nil {
		t.Fatalf("answer to port 123: %v", err)
	}
	verdictsAre(t, a.rose(func() {
		if _, err := test.Ask(a.node.remote, "udp4", addrPort(a.v4, 123)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a datagram from another port of the same host: %v, want connection refused", err)
		}
	}), map[bpfmap.Verdict]uint64{bpfmap.RefusedGuard: 1})
	other := a.unconnected(unix.AF_INET, 124)
	if err := unix.Sendto(other, []byte("?"), 0, sockaddr(other, netip.AddrPortFrom(remote4(a.number), 9001))); err != nil {
		t.Fatal(err)
	}
	verdictsAre(t, a.rose(func() {
		a.node.remote.Do(func() {
			from, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Error(err)
				return
			}
			defer unix.Close(from)
			err = errors.Join(unix.Bind(from, sockaddr(from, netip.AddrPortFrom(remote4(a.number), 9001))),
				unix.Connect(from, sockaddr(from, netip.AddrPortFrom(a.v4, 123))))
			if err == nil {
				_, err = unix.Write(from, []byte("?"))
			}
			if err != nil {
				t.Error(err)
			}
		})
	}), map[bpfmap.Verdict]uint64{bpfmap.RefusedGuard: 1})
}

// A workload has its own slots: however many hosts it asks, no other loses one,
// and what it held goes with it.
func TestFlowsHaveABudget(t *testing.T) {
	a := guarded(t, workload.GuardEnforce)
	fd := a.unconnected(unix.AF_INET, 123)
	for i := range 4 * bpfmap.FlowSlots {
		to := netip.AddrPortFrom(remote4(a.number), uint16(1000+i))
		if err := unix.Sendto(fd, []byte("?"), 0, sockaddr(fd, to)); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
			t.Fatalf("send to %s: %v", to, err)
		}
	}
	if held := rowCounts(t, a.node.Datapath)["flows"]; held == 0 || held > bpfmap.FlowSlots {
		t.Errorf("the workload holds %d flows, want at most %d", held, bpfmap.FlowSlots)
	}
	if err := a.node.Remove(a.key); err != nil {
		t.Fatal(err)
	}
	if held := rowCounts(t, a.node.Datapath)["flows"]; held != 0 {
		t.Errorf("%d flows are left of a workload that was removed", held)
	}
}
