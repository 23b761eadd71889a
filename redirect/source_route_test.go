// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

const pktOptions2292 = 6 // IPV6_2292PKTOPTIONS

// segmentRoute is an IPV6_RTHDR of type 4 that goes by way of addr.
func segmentRoute(addr netip.Addr) []byte {
	header := []byte{0, 4, 4, 1, 1, 0, 0, 0}
	header = append(header, make([]byte, 16)...) // the destination
	return append(header, addr.AsSlice()...)
}

// homeRoute is an IPV6_RTHDR of type 2, the one that control messages may have.
func homeRoute(addr netip.Addr) []byte {
	return append([]byte{0, 2, 2, 1, 0, 0, 0, 0}, addr.AsSlice()...)
}

// packetOptions is what IPV6_2292PKTOPTIONS takes: a control message with a
// routing header.
func packetOptions(header []byte) []byte {
	message := binary.NativeEndian.AppendUint64(nil, uint64(unix.CmsgLen(len(header))))
	message = binary.NativeEndian.AppendUint32(message, unix.SOL_IPV6)
	message = binary.NativeEndian.AppendUint32(message, unix.IPV6_RTHDR)
	return append(message, header...)
}

// looseRoute are IP options that go by way of addr, strictRoute likewise.
func looseRoute(addr netip.Addr) []byte {
	return append([]byte{1, 131, 7, 4}, addr.AsSlice()...)
}

func strictRoute(addr netip.Addr) []byte {
	return append([]byte{137, 7, 4}, append(addr.AsSlice(), 1)...)
}

// recordRoute are IP options that change nothing of the way.
func recordRoute() []byte { return []byte{7, 7, 4, 0, 0, 0, 0, 0} }

// sourceRoutes are the options that choose the way of a socket's packets.
func sourceRoutes(far4, far6 netip.Addr) []step {
	option := func(level, name int, value []byte) step {
		return step{Do: "setBytes", Args: [3]int{level, name}, Bytes: value}
	}
	return []step{
		option(unix.SOL_IPV6, unix.IPV6_RTHDR, segmentRoute(far6)),
		option(unix.SOL_IPV6, pktOptions2292, packetOptions(homeRoute(far6))),
		option(unix.SOL_IP, unix.IP_OPTIONS, looseRoute(far4)),
		option(unix.SOL_IP, unix.IP_OPTIONS, strictRoute(far4)),
	}
}

// possible are those of the options that this kernel takes from root where Weir
// has no say: one without CONFIG_IPV6_MIP6 knows no routing header of type 2.
func possible(t *testing.T, elsewhere *test.NetNS, options []step) (taken []step) {
	t.Helper()
	elsewhere.Do(func() {
		for _, option := range options {
			fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			err = unix.SetsockoptString(fd, option.Args[0], option.Args[1], string(option.Bytes))
			unix.Close(fd)
			if err == nil {
				taken = append(taken, option)
			} else if !errors.Is(err, unix.EINVAL) || option.Args[1] != pktOptions2292 {
				t.Fatalf("%s: %v", option, err)
			}
		}
	})
	return taken
}

// An option that sends packets by way of another address would lead past the
// proxy whatever connect decides, so it is refused before and after.
func TestSourceRouteIsRefused(t *testing.T) {
	a := proxiedAlloc(t)
	app := a.serve(taskUID, a.taskCg, "tcp", "[::]:9000")
	far := segments(t, a.node.remote)
	p := a.actor(t, 0, a.taskCg) // newer kernels want CAP_NET_RAW for a source route of IPv4
	for _, option := range sourceRoutes(remote4(1), remote6(1)) {
		for _, protocol := range []int{unix.IPPROTO_TCP, unix.IPPROTO_MPTCP} {
			t.Run(fmt.Sprint(option.Args[:2], " protocol ", protocol), func(t *testing.T) {
				before := script(nil).open(unix.AF_INET6, protocol).do(option).fails(unix.ENOPROTOOPT)
				a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedOption: 1, bpfmap.Redirected: 1}, func() {
					got := p.last(t, before.connect(elsewhere6).ask(""))
					a.answered(got.Answer, nil, netip.MustParseAddrPort(elsewhere6), a.v4)
				})
				a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedOption: 1, bpfmap.Local: 1}, func() {
					got := p.last(t, before.connect(addrPort(a.v6, 9000)).ask(""))
					direct(t, got.Answer, app.Name, netip.AddrPortFrom(a.v6, 9000))
				})
				a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedOption: 1, bpfmap.Redirected: 1}, func() {
					after := script(nil).open(unix.AF_INET6, protocol).connect(elsewhere6).do(option).fails(unix.ENOPROTOOPT)
					a.answered(p.last(t, after.ask("")).Answer, nil, netip.MustParseAddrPort(elsewhere6), a.v4)
				})
			})
		}
	}
	t.Run("IPv4 socket", func(t *testing.T) {
		a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedOption: 1, bpfmap.Redirected: 1}, func() {
			s := stream(unix.AF_INET).setBytes(unix.SOL_IP, unix.IP_OPTIONS, looseRoute(remote4(1))).fails(unix.ENOPROTOOPT)
			a.answered(p.last(t, s.connect(somewhere).ask("")).Answer, nil, netip.MustParseAddrPort(somewhere), a.v4)
		})
	})
	if now := segments(t, a.node.remote); now != far {
		t.Errorf("%d segments reached the remote", now-far)
	}
}

// What does not choose the way stays what it is.
func TestOtherPacketOptionsStay(t *testing.T) {
	a := proxiedAlloc(t)
	p := a.task(t)
	a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.Redirected: 1}, func() {
		s := stream(unix.AF_INET).setBytes(unix.SOL_IP, unix.IP_OPTIONS, recordRoute()).
			setBytes(unix.SOL_IP, unix.IP_OPTIONS, nil).connect(somewhere).ask("")
		a.answered(p.last(t, s).Answer, nil, netip.MustParseAddrPort(somewhere), a.v4)
	})
	a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.Redirected: 1}, func() {
		s := stream(unix.AF_INET6).setBytes(unix.SOL_IPV6, unix.IPV6_RTHDR, nil).
			set(unix.SOL_IPV6, unix.IPV6_RECVRTHDR, 1).setBytes(unix.SOL_IPV6, pktOptions2292, nil).connect(elsewhere6).ask("")
		a.answered(p.last(t, s).Answer, nil, netip.MustParseAddrPort(elsewhere6), a.v4)
	})
}

// Excluded UIDs, and everybody outside of transparent mode, route as they like.
func TestSourceRouteIsTheirs(t *testing.T) {
	n := newNode(t)
	for _, mode := range []workload.Mode{workload.ModeTransparent, workload.ModeDirect, workload.ModeGateway} {
		t.Run(string(mode), func(t *testing.T) {
			a := n.newAlloc()
			a.add(func(r *workload.Request) {
				r.Mode = mode
				if mode == workload.ModeTransparent {
					r.ExcludeUIDs = []uint32{0}
				}
			})
			p := a.actor(t, 0, a.taskCg)
			for _, option := range possible(t, n.remote, sourceRoutes(remote4(a.number), remote6(a.number))) {
				a.moves(t, map[bpfmap.Verdict]uint64{}, func() { p.run(t, stream(unix.AF_INET6).do(option)) })
			}
		})
	}
}

// A socket that has the option from before the namespace was put under Weir is
// found by connect.
func TestSourceRouteOfBefore(t *testing.T) {
	n := newNode(t)
	for i, option := range possible(t, n.remote, sourceRoutes(remote4(1), remote6(1))) {
		t.Run(fmt.Sprint(option.Args[:2], " ", i), func(t *testing.T) {
			a := n.newAlloc()
			p := a.actor(t, 0, a.taskCg)
			p.run(t, stream(unix.AF_INET6).do(option))
			a.add()
			a.startProxy()
			a.serve(taskUID, a.taskCg, "tcp", "[::]:9000")
			far := segments(t, n.remote)
			for _, addr := range slices.Concat([]string{elsewhere6, addrPort(a.v6, 9000), "[::1]:9000", "[::ffff:192.0.2.77]:80"}) {
				a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedOption: 1}, func() {
					p.run(t, script(nil).to("connect", addr).fails(unix.ENETUNREACH))
				})
			}
			if now := segments(t, n.remote); now != far {
				t.Errorf("%d segments reached the remote", now-far)
			}
		})
	}
}

// What the kernel does not let choose the way of a TCP connection.
func TestOptionsWithoutInfluence(t *testing.T) {
	a := proxiedAlloc(t)
	p := a.task(t)
	eth0 := deviceIndex(t, a.NetNS, "eth0")
	for _, tc := range []struct {
		name   string
		script script
		want   string
	}{
		{"IP_UNICAST_IF", stream(unix.AF_INET).set(unix.SOL_IP, unix.IP_UNICAST_IF, int(htonl(eth0))), somewhere},
		{"IPV6_UNICAST_IF", stream(unix.AF_INET6).set(unix.SOL_IPV6, unix.IPV6_UNICAST_IF, int(htonl(eth0))), elsewhere6},
		{"SO_DONTROUTE", stream(unix.AF_INET).set(unix.SOL_SOCKET, unix.SO_DONTROUTE, 1), somewhere},
		{"IPV6_PKTINFO", stream(unix.AF_INET6).setBytes(unix.SOL_IPV6, unix.IPV6_PKTINFO,
			binary.NativeEndian.AppendUint32(a.v6.AsSlice(), uint32(eth0))), elsewhere6},
		{"IPV6_NEXTHOP", stream(unix.AF_INET6).setBytes(unix.SOL_IPV6, unix.IPV6_NEXTHOP, make([]byte, 28)).fails(unix.ENOPROTOOPT), elsewhere6},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a.proxied(t, p, tc.script.connect(tc.want).ask(""), tc.want, a.v4)
			last := len(tc.script) - 1
			later := tc.script[:last].connect(tc.want).do(tc.script[last])
			a.proxied(t, p, later.ask(""), tc.want, a.v4)
		})
	}
}

func htonl(n int) uint32 {
	return binary.NativeEndian.Uint32(binary.BigEndian.AppendUint32(nil, uint32(n)))
}

func deviceIndex(t *testing.T, ns *test.NetNS, name string) (index int) {
	t.Helper()
	ns.Do(func() {
		device, err := net.InterfaceByName(name)
		if err != nil {
			t.Fatal(err)
		}
		index = device.Index
	})
	return index
}
