// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/test"
)

// A change in one namespace is told under the number of that namespace, and of
// no other one that is followed.
func TestNetworkWatchNamesTheNamespace(t *testing.T) {
	test.Need(t, test.Root)
	watch, err := host.NewNetworkWatch()
	if err != nil {
		t.Fatal(err)
	}
	heard, ended := make(chan int32, 1024), make(chan error, 1)
	go func() {
		ended <- watch.Run(func(number int32, lost bool) {
			if !lost {
				heard <- number
			}
		})
	}()
	changes, calm := test.NewNetNS(t), test.NewNetNS(t)
	numbers := make(map[string]int32)
	for _, ns := range []*test.NetNS{changes, calm} {
		if numbers[ns.Path], err = watch.Number(ns.Path); err != nil {
			t.Fatal(err)
		}
		if again, err := watch.Number(ns.Path); err != nil || again != numbers[ns.Path] {
			t.Errorf("asked again, the number is %d, %v; was %d", again, err, numbers[ns.Path])
		}
	}
	if numbers[changes.Path] == numbers[calm.Path] {
		t.Fatalf("both namespaces have number %d", numbers[calm.Path])
	}
	for name, change := range map[string]func(netlink.Link) error{
		"an address comes": func(lo netlink.Link) error {
			return netlink.AddrAdd(lo, &netlink.Addr{IPNet: host.IPNet(netip.MustParsePrefix("10.1.2.3/32"))})
		},
		"a route comes": func(lo netlink.Link) error {
			return netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: host.IPNet(netip.MustParsePrefix("10.4.0.0/16"))})
		},
		"an IPv6 address comes": func(lo netlink.Link) error {
			return netlink.AddrAdd(lo, &netlink.Addr{IPNet: host.IPNet(netip.MustParsePrefix("fd01::1/128"))})
		},
	} {
		changes.Do(func() {
			var lo netlink.Link
			if lo, err = netlink.LinkByIndex(host.LoIndex); err == nil {
				err = change(lo)
			}
		})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		test.Eventually(t, func() error {
			for {
				select {
				case number := <-heard:
					if number == numbers[calm.Path] {
						t.Errorf("%s: it is told of the other namespace", name)
					}
					if number == numbers[changes.Path] {
						return nil
					}
				default:
					return fmt.Errorf("%s: not told", name)
				}
			}
		}, "the change to be told")
	}
	if err := watch.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("the watch ended with %v", err)
	}
}
