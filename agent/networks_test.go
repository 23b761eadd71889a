// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// An address that is replaced after ADD is the workload's own at once, and the
// one before is not any more.
func TestAgentFollowsAReplacedAddress(t *testing.T) {
	n := newNode(t)
	id := numbered(1)
	ns, key := n.transparent(id)
	n.fake.answers(registered(id))
	n.run()
	n.eventually(id, api.StateManaged)
	n.own(key, "172.26.64.2")
	before := n.agent.Status().Counts.Repaired
	var err error
	ns.Do(func() {
		var link netlink.Link
		if link, err = netlink.LinkByName("eth0"); err != nil {
			return
		}
		mask := net.CIDRMask(20, 32)
		err = errors.Join(
			netlink.AddrDel(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(172, 26, 64, 2), Mask: mask}}),
			netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(172, 26, 64, 3), Mask: mask}}),
		)
	})
	if err != nil {
		t.Fatal(err)
	}
	n.own(key, "172.26.64.3")
	test.Eventually(t, func() error { // it is counted after it was made
		if now := n.agent.Status().Counts.Repaired; now == before {
			return fmt.Errorf("%d repairs are counted, want more than %d", now, before)
		}
		return nil
	}, "the repair to be counted")
}

// own waits until that is the only IPv4 address of the workload.
func (n *node) own(key workload.AttachmentID, want string) {
	n.t.Helper()
	test.Eventually(n.t, func() error {
		if moved, err := n.Moved(key); err != nil || moved {
			return fmt.Errorf("its record is not that of its network: %t, %w", moved, err)
		}
		list, err := n.Workloads()
		if err != nil || len(list) != 1 {
			return fmt.Errorf("%d workloads: %w", len(list), err)
		}
		own := slices.DeleteFunc(list[0].Addresses, netip.Addr.Is6)
		if len(own) != 1 || own[0].String() != want {
			return fmt.Errorf("own addresses are %v, want %s", own, want)
		}
		return nil
	}, "the own address to be "+want)
}
