// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// Addresses of an allocation's second network, and what lies behind it.
var (
	second4, second6       = netip.MustParseAddr("10.19.1.2"), netip.MustParseAddr("fd19:1::2")
	secondPeer4            = netip.MustParseAddr("10.19.1.1")
	secondPeer6            = netip.MustParseAddr("fd19:1::1")
	behind4, withinBehind4 = netip.MustParsePrefix("172.30.0.0/16"), netip.MustParsePrefix("172.30.7.0/24")
)

// addNetwork joins the allocation to a second network.
func (a *alloc) addNetwork() {
	a.node.t.Helper()
	test.Veth(a.node.t,
		test.VethEnd{NetNS: a.NetNS, Name: "net1", Addrs: []netip.Prefix{netip.PrefixFrom(second4, 24), netip.PrefixFrom(second6, 64)}},
		test.VethEnd{NetNS: a.node.remote, Name: fmt.Sprintf("second%d", a.number), Addrs: []netip.Prefix{netip.PrefixFrom(secondPeer4, 24), netip.PrefixFrom(secondPeer6, 64)}})
}

// startDualProxy is startProxy for both families.
func (a *alloc) startDualProxy() {
	a.node.t.Helper()
	a.startProxy()
	a.serve(proxyUID, a.proxyCg, "tcp6", fmt.Sprintf("[::1]:%d", outboundPort))
}

// wantOwn fails the test unless a redirected connection to the destination has
// this own address, for the application and for the proxy, and its origin.
func (a *alloc) wantOwn(network string, destination, own netip.Addr) {
	a.node.t.Helper()
	answer, err := a.ask(network, addrPort(destination, 4321))
	if err != nil {
		a.node.t.Errorf("dial %s: %v", destination, err)
		return
	}
	if from := answer.From.Addr().Unmap(); from != own || answer.Peer.Addr().Unmap() != own {
		a.node.t.Errorf("dialled %s: own address is %s, for the proxy %s; want %s", destination, from, answer.Peer, own)
	}
	if want := netip.AddrPortFrom(destination, 4321); answer.Origin != want {
		a.node.t.Errorf("dialled %s: origin is %s", want, answer.Origin)
	}
}

func (a *alloc) inside(change func() error) {
	a.node.t.Helper()
	var err error
	a.Do(func() { err = change() })
	if err != nil {
		a.node.t.Fatal(err)
	}
}

func (a *alloc) routeVia(prefix netip.Prefix, gateway netip.Addr) {
	a.node.t.Helper()
	a.inside(func() error {
		return netlink.RouteReplace(&netlink.Route{Dst: host.IPNet(prefix), Gw: gateway.AsSlice()})
	})
}

// repaired runs CHECK and fails the test unless it says what was wrong; a second
// one must find nothing.
func (a *alloc) repaired(want string) {
	a.node.t.Helper()
	status, err := a.node.Status()
	if err != nil {
		a.node.t.Fatal(err)
	}
	if !strings.Contains(fmt.Sprint(status.Problems), want) {
		a.node.t.Errorf("problems are %v, want one with %q", status.Problems, want)
	}
	repairs, err := a.node.Check(a.key, a.Path)
	if err != nil || !strings.Contains(fmt.Sprint(repairs), want) {
		a.node.t.Errorf("check repaired %q, %v; want %q among it", repairs, err, want)
	}
	if repairs, err := a.node.Check(a.key, a.Path); err != nil || len(repairs) > 0 {
		a.node.t.Errorf("the next check repaired %q, %v; want nothing", repairs, err)
	}
	healthy(a.node.t, a.node.Datapath)
}

func TestOwnAddressIsThatOfTheNetwork(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.addNetwork()
	a.routeVia(behind4, secondPeer4)
	a.routeVia(withinBehind4, remote4(1))
	a.add()
	a.startDualProxy()
	a.wantOwn("tcp4", remote4(1), a.v4)
	a.wantOwn("tcp4", netip.MustParseAddr("203.0.113.9"), a.v4) // by the default route
	a.wantOwn("tcp4", secondPeer4, second4)
	a.wantOwn("tcp4", netip.MustParseAddr("172.30.1.1"), second4)
	a.wantOwn("tcp4", netip.MustParseAddr("172.30.7.1"), a.v4)
	a.wantOwn("tcp6", remote6(1), a.v6)
	a.wantOwn("tcp6", secondPeer6, second6)
	for _, own := range []netip.Addr{second4, second6} {
		if moved := a.rose(func() { _, _ = a.ask("tcp", addrPort(own, 1)) }); moved[bpfmap.Local] != 1 {
			t.Errorf("dialled %s of the second network: %v, want it local", own, moved)
		}
	}
	healthy(t, n.Datapath)
	if err := n.Remove(a.key); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, n.Datapath)
	if v4, v6 := routesOf(t, a.NetNS); v4 || v6 {
		t.Errorf("routes are left: IPv4 %t, IPv6 %t", v4, v6)
	}
}

// Another network that comes after ADD and goes again; the same destination is
// routed by one and then by the other.
func TestNetworkThatComesAndGoes(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startDualProxy()
	a.wantOwn("tcp4", secondPeer4, a.v4)
	a.addNetwork()
	a.repaired("its addresses are")
	a.wantOwn("tcp4", secondPeer4, second4)
	a.wantOwn("tcp6", secondPeer6, second6)
	a.wantOwn("tcp4", remote4(1), a.v4)
	if moved := a.rose(func() { _, _ = a.ask("tcp4", addrPort(second4, 1)) }); moved[bpfmap.Local] != 1 {
		t.Errorf("dialled an own address that came after ADD: %v, want it local", moved)
	}
	a.routeVia(netip.PrefixFrom(remote4(1), 32), secondPeer4)
	a.repaired("own addresses of its connections")
	a.wantOwn("tcp4", remote4(1), second4)
	a.inside(func() error {
		link, err := netlink.LinkByName("net1")
		if err != nil {
			return err
		}
		return netlink.LinkDel(link)
	})
	a.repaired("its addresses are")
	a.wantOwn("tcp4", secondPeer4, a.v4)
	a.wantOwn("tcp4", remote4(1), a.v4)
	if moved := a.rose(func() { a.wantOwn("tcp4", second4, a.v4) }); moved[bpfmap.Redirected] != 1 {
		t.Errorf("dialled an address that is not own any more: %v, want it redirected", moved)
	}
	if err := n.Remove(a.key); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, n.Datapath)
}

func TestAddressIsReplaced(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startDualProxy()
	a.wantOwn("tcp4", remote4(1), a.v4)
	a.wantOwn("tcp6", remote6(1), a.v6)
	new4, new6 := netip.MustParseAddr("10.9.1.77"), netip.MustParseAddr("fd09:1::77")
	a.replaceAddress(netip.PrefixFrom(a.v4, 24), netip.PrefixFrom(new4, 24))
	a.replaceAddress(netip.PrefixFrom(a.v6, 64), netip.PrefixFrom(new6, 64))
	a.repaired("its addresses are")
	a.wantOwn("tcp4", remote4(1), new4)
	a.wantOwn("tcp6", remote6(1), new6)
	// The former one is somebody else's now.
	a.wantOwn("tcp4", a.v4, new4)
	// A further ADD, as of a restarted client of Nomad, names the former address.
	a.add()
	a.wantOwn("tcp4", remote4(1), new4)
	healthy(t, n.Datapath)
}

// replaceAddress gives eth0 another address in place of one that it has.
func (a *alloc) replaceAddress(old, replacement netip.Prefix) {
	a.node.t.Helper()
	a.inside(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := netlink.AddrDel(link, &netlink.Addr{IPNet: host.IPNet(old)}); err != nil {
			return err
		}
		return netlink.AddrAdd(link, &netlink.Addr{IPNet: host.IPNet(replacement), Flags: unix.IFA_F_NODAD})
	})
}
