// SPDX-License-Identifier: MPL-2.0

package hostport

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"github.com/weirmesh/weir/cni/network/attachment"
	"golang.org/x/sys/unix"
)

// Attributes of ctnetlink that the library has no names for, of
// include/uapi/linux/netfilter/nfnetlink_conntrack.h, and the bits of the flags, which
// net/netfilter/nf_internals.h names (both since Linux 5.8).
const (
	ctaFilter          = 25 // CTA_FILTER
	ctaFilterOrigFlags = 1  // CTA_FILTER_ORIG_FLAGS
	ctaFilterProtoNum  = 1 << 3
	ctaFilterDstPort   = 1 << 5
)

// ForgetFlows ends what the kernel knows of UDP flows to the host ports: a flow
// that goes on would else stay with the address that it began with. TCP begins anew
// by itself.
func ForgetFlows(r *attachment.Record) error {
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		var ports []uint16
		for _, p := range r.Ports {
			if p.Protocol == unix.IPPROTO_UDP && p.Host.Addr().Is4() == (family == unix.AF_INET) {
				ports = append(ports, p.Host.Port())
			}
		}
		if len(ports) == 0 {
			continue
		}
		err := deleteFlows(family, ports)
		// EINVAL and EOPNOTSUPP are the answers of a kernel before 6.12, to which the tuple is
		// no filter but the name of one flow, and lacks its addresses.
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			err = listAndDeleteFlows(family, ports)
		}
		if err != nil {
			return fmt.Errorf("forget UDP flows to host ports: %w", err)
		}
	}
	return nil
}

// deleteFlows has the kernel (6.12 or newer) delete the UDP flows to these ports. It walks
// its table for each of them, but takes no lock for a row that is empty, as a list does:
// that holds up the processor's network traffic for 9 ms in a table of 262,144 rows.
func deleteFlows(family netlink.InetFamily, ports []uint16) error {
	socket, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer func() { go socket.Close() }() // as nft.WithNftables closes its own
	sockets := map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: {Socket: socket}}
	for _, port := range ports {
		request := nl.NewNetlinkRequest(int(netlink.ConntrackTable)<<8|nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK)
		request.Sockets = sockets
		request.AddData(&nl.Nfgenmsg{NfgenFamily: uint8(family), Version: nl.NFNETLINK_V0})
		tuple := nl.NewRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_ORIG, nil)
		proto := tuple.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_PROTO, nil)
		proto.AddRtAttr(nl.CTA_PROTO_NUM, []byte{unix.IPPROTO_UDP})
		proto.AddRtAttr(nl.CTA_PROTO_DST_PORT, nl.BEUint16Attr(port))
		request.AddData(tuple)
		filter := nl.NewRtAttr(unix.NLA_F_NESTED|ctaFilter, nil)
		filter.AddRtAttr(ctaFilterOrigFlags, nl.Uint32Attr(ctaFilterProtoNum|ctaFilterDstPort))
		request.AddData(filter)
		if _, err := request.Execute(unix.NETLINK_NETFILTER, 0); err != nil {
			return err
		}
	}
	return nil
}

// listAndDeleteFlows reads all flows of the family and deletes those to these ports.
func listAndDeleteFlows(family netlink.InetFamily, ports []uint16) error {
	var filters []netlink.CustomConntrackFilter
	for _, port := range ports {
		filter := &netlink.ConntrackFilter{}
		if err := errors.Join(filter.AddProtocol(unix.IPPROTO_UDP), filter.AddPort(netlink.ConntrackOrigDstPort, port)); err != nil {
			return err
		}
		filters = append(filters, filter)
	}
	_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, filters...)
	return err
}
