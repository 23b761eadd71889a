// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/test"
)

func TestAddressesIn(t *testing.T) {
	test.Need(t, test.Root)
	outside, inside := test.NewNetNS(t), test.NewNetNS(t)
	want := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("172.26.64.2"), netip.MustParseAddr("fd00::2")}
	test.Veth(t,
		test.VethEnd{NetNS: outside, Addrs: []netip.Prefix{netip.MustParsePrefix("172.26.64.1/20")}},
		test.VethEnd{NetNS: inside, Addrs: []netip.Prefix{netip.MustParsePrefix("172.26.64.2/20"), netip.MustParsePrefix("fd00::2/64")}})
	got, err := AddressesIn(inside.Path)
	if err != nil {
		t.Fatal(err)
	}
	for _, addr := range want {
		if !slices.Contains(got, addr) {
			t.Errorf("addresses %v: want %s among them", got, addr)
		}
	}
	if slices.Contains(got, netip.MustParseAddr("172.26.64.1")) {
		t.Errorf("addresses %v: one is outside", got)
	}
}

func TestAddressesInNoNamespace(t *testing.T) {
	if _, err := AddressesIn(t.TempDir() + "/gone"); !errors.Is(err, host.ErrNetNSGone) {
		t.Errorf("error %v: want %v", err, host.ErrNetNSGone)
	}
}
