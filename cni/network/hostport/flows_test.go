// SPDX-License-Identifier: MPL-2.0

package hostport

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// Of all flows those of UDP to a port are deleted, to whatever address, and no other. Before
// Linux 6.12 both ways are the same: the kernel refuses the other one, and deletes nothing.
func TestFlowsToPortsAreDeleted(t *testing.T) {
	test.Need(t, test.Root)
	ways := map[string]func(netlink.InetFamily, []uint16) error{"as ADD does": forget, "by a list": listAndDeleteFlows}
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			ns := test.NewNetNS(t)
			ns.Do(func() {
				for _, to := range []string{"192.0.2.1", "192.0.2.2", "2001:db8::1"} {
					for _, port := range []uint16{8080, 8081, 9090} {
						makeFlow(t, unix.IPPROTO_UDP, to, port)
						makeFlow(t, unix.IPPROTO_TCP, to, port)
					}
				}
				if err := way(unix.AF_INET, []uint16{8080, 9090}); err != nil {
					t.Fatal(err)
				}
				want := []string{"6 192.0.2.1:8080", "6 192.0.2.1:8081", "6 192.0.2.1:9090", "17 192.0.2.1:8081",
					"6 192.0.2.2:8080", "6 192.0.2.2:8081", "6 192.0.2.2:9090", "17 192.0.2.2:8081"}
				slices.Sort(want)
				if diff := cmp.Diff(want, flows(t, unix.AF_INET)); diff != "" {
					t.Errorf("flows of IPv4 (-want +got):\n%s", diff)
				}
				if got := flows(t, unix.AF_INET6); len(got) != 6 {
					t.Errorf("%d flows of IPv6 are left, want all 6: %q", len(got), got)
				}
				if err := way(unix.AF_INET6, []uint16{8080}); err != nil {
					t.Fatal(err)
				}
				if got := flows(t, unix.AF_INET6); len(got) != 5 || slices.Contains(got, "17 [2001:db8::1]:8080") {
					t.Errorf("flows of IPv6 that are left: %q, want 5 and none of UDP to 8080", got)
				}
			})
		})
	}
}

func forget(family netlink.InetFamily, ports []uint16) error {
	host := netip.IPv4Unspecified()
	if family == unix.AF_INET6 {
		host = netip.IPv6Unspecified()
	}
	r := &attachment.Record{}
	for _, port := range ports {
		for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			r.Ports = append(r.Ports, attachment.Port{Protocol: protocol, Host: netip.AddrPortFrom(host, port)})
		}
	}
	return ForgetFlows(r)
}

func makeFlow(t *testing.T, protocol uint8, to string, port uint16) {
	t.Helper()
	family, from, dst := netlink.InetFamily(unix.AF_INET), net.ParseIP("192.0.2.9").To4(), net.ParseIP(to).To4()
	if dst == nil {
		family, from, dst = unix.AF_INET6, net.ParseIP("2001:db8::9"), net.ParseIP(to)
	}
	const client = 40000
	flow := &netlink.ConntrackFlow{
		FamilyType: uint8(family), TimeOut: 100,
		Forward: netlink.IPTuple{SrcIP: from, DstIP: dst, SrcPort: client, DstPort: port, Protocol: protocol},
		Reverse: netlink.IPTuple{SrcIP: dst, DstIP: from, SrcPort: port, DstPort: client, Protocol: protocol},
	}
	if protocol == unix.IPPROTO_TCP {
		flow.ProtoInfo = &netlink.ProtoInfoTCP{State: 3} // established
	}
	if err := netlink.ConntrackCreate(netlink.ConntrackTable, family, flow); err != nil {
		t.Fatalf("make flow to %s: %v", to, err)
	}
}

func flows(t *testing.T, family netlink.InetFamily) (list []string) {
	t.Helper()
	all, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		to := net.JoinHostPort(f.Forward.DstIP.String(), fmt.Sprint(f.Forward.DstPort))
		list = append(list, fmt.Sprintf("%d %s", f.Forward.Protocol, to))
	}
	slices.Sort(list)
	return list
}
