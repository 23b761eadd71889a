// SPDX-License-Identifier: MPL-2.0

package network

import (
	"errors"
	"fmt"
	"net"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/cni/network/forward"
	"github.com/weirmesh/weir/cni/network/hostport"
	"github.com/weirmesh/weir/cni/network/nft"
	"github.com/weirmesh/weir/redirect/host/sysctl"
	"golang.org/x/sys/unix"
)

// ensureRules makes the rules that the bridge needs and that are not there. One
// set serves all attachments of a bridge; see removeRules.
func ensureRules(r *attachment.Record) (repaired []string, err error) {
	err = nft.WithNftables(func(conn *nftables.Conn) error {
		repaired, err = ensureRulesBy(r, conn)
		return err
	})
	return repaired, err
}

func ensureRulesBy(r *attachment.Record, conn *nftables.Conn) (repaired []string, err error) {
	steps := []func(*attachment.Record, *nftables.Conn) ([]string, error){ensureMasquerade, forward.EnsureForward}
	if r.Mapper == attachment.MapperWeir {
		steps = append(steps, ensureLoopback, func(_ *attachment.Record, conn *nftables.Conn) ([]string, error) {
			return hostport.EnsurePortMaps(conn)
		})
	}
	for _, step := range steps {
		more, err := step(r, conn)
		repaired = append(repaired, more...)
		if err != nil {
			return repaired, err
		}
	}
	return repaired, nil
}

func ownChain(table *nftables.Table) *nftables.Chain {
	return &nftables.Chain{
		Name: "postrouting", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
	}
}

// ensureMasquerade hides the allocations' addresses behind the node's. What
// comes back over the bridge by a host port is masqueraded too: its answer
// would else go straight to a neighbour that asked somebody else.
func ensureMasquerade(r *attachment.Record, conn *nftables.Conn) (repaired []string, err error) {
	var wanted []nft.Rule
	for _, subnet := range r.Subnets() {
		if r.Masquerade {
			wanted = append(wanted, masquerade(r.Bridge, subnet))
		}
		if r.Hairpin || r.Mapper == attachment.MapperWeir {
			wanted = append(wanted, hairpin(r.Bridge, subnet))
		}
	}
	if r.Mapper == attachment.MapperWeir {
		masquerade, _ := hostport.LoopbackRules(r)
		wanted = append(wanted, masquerade...)
	}
	return nft.EnsureIn(conn, ownChain(nft.OwnTable()), wanted)
}

// ensureLoopback lets the node's own connections by loopback reach the bridge,
// and nobody else's come back that way.
func ensureLoopback(r *attachment.Record, conn *nftables.Conn) (repaired []string, err error) {
	_, stop := hostport.LoopbackRules(r)
	if repaired, err = nft.EnsureIn(conn, hostport.StopChain(nft.OwnTable()), stop); err != nil {
		return repaired, err
	}
	changed, err := sysctl.Shared().Set("1", "net", "ipv4", "conf", r.Bridge, "route_localnet")
	if changed {
		repaired = append(repaired, "route_localnet of "+r.Bridge)
	}
	return repaired, err
}

// masquerade is: saddr in the subnet, not out of the bridge, no multicast.
func masquerade(bridge string, subnet *net.IPNet) nft.Rule {
	multicast := &net.IPNet{IP: net.IPv4(224, 0, 0, 0).To4(), Mask: net.CIDRMask(4, 32)}
	if subnet.IP.To4() == nil {
		multicast = &net.IPNet{IP: net.ParseIP("ff00::"), Mask: net.CIDRMask(8, 128)}
	}
	exprs := append(nft.Family(subnet), nft.Address(subnet, nft.Source, expr.CmpOpEq)...)
	exprs = append(exprs, nft.Device(expr.MetaKeyOIFNAME, bridge, expr.CmpOpNeq)...)
	exprs = append(exprs, nft.Address(multicast, nft.Destination, expr.CmpOpNeq)...)
	return nft.Rule{Comment: fmt.Sprintf("weir: masquerade %s from %s", subnet, bridge), Exprs: append(exprs, &expr.Counter{}, &expr.Masq{})}
}

// hairpin is: saddr in the subnet, back out of the bridge, destination translated.
func hairpin(bridge string, subnet *net.IPNet) nft.Rule {
	exprs := append(nft.Family(subnet), nft.Address(subnet, nft.Source, expr.CmpOpEq)...)
	exprs = append(exprs, nft.Device(expr.MetaKeyOIFNAME, bridge, expr.CmpOpEq)...)
	exprs = append(exprs, nft.Conntrack(expr.CtKeySTATUS, nft.CtStatusDNAT)...)
	return nft.Rule{Comment: fmt.Sprintf("weir: hairpin %s on %s", subnet, bridge), Exprs: append(exprs, &expr.Counter{}, &expr.Masq{})}
}

// removeRules removes every rule for the bridge, and the plugin's table when
// it serves no other bridge. Rules that are gone already are not missed.
func removeRules(bridge string) error {
	return nft.WithNftables(func(conn *nftables.Conn) error {
		chains, err := nft.ListChains(conn)
		if err != nil {
			return err
		}
		var problems []error
		own, others := false, false // whether the table is there, and serves another bridge
		for _, chain := range chains {
			isOwn := chain.Table.Name == nft.Table && chain.Table.Family == nftables.TableFamilyINet
			if !isOwn && !forward.MayHoldAccept(chain) {
				continue
			}
			kept, err := removeRulesOf(conn, chain, bridge)
			problems = append(problems, err)
			// What is kept is another bridge's, or somebody else's; what could not be
			// read may be.
			own, others = own || isOwn, others || isOwn && (err != nil || kept > 0 && !hostport.ServesAllBridges(chain))
		}
		if own && !others {
			problems = append(problems, removeTable(conn))
		}
		return errors.Join(problems...)
	})
}

// removeTable removes the plugin's table, which may be gone already.
func removeTable(conn *nftables.Conn) error {
	conn.DelTable(nft.OwnTable())
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove table %s: %w", nft.Table, err)
	}
	return nil
}

// removeRulesOf removes the rules for the bridge from one chain, and counts the others.
func removeRulesOf(conn *nftables.Conn, chain *nftables.Chain, bridge string) (kept int, err error) {
	rules, err := nft.RulesOf(conn, chain.Table, chain)
	if err != nil {
		return 0, err
	}
	var problems []error
	for _, rule := range rules {
		if nft.IsFor(rule, bridge) {
			problems = append(problems, conn.DelRule(rule))
		} else {
			kept++
		}
	}
	if kept == len(rules) {
		return kept, nil
	}
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		problems = append(problems, fmt.Errorf("remove rules for %s from %s: %w", bridge, nft.ChainName(chain), err))
	}
	return kept, errors.Join(problems...)
}

// loopbackRoute brings the answers to a connection from ::1 to it: the kernel
// takes an IPv6 route to loopback only for the device that a packet came by. It
// drops what came to ::1 from outside before it asks for a route, so nobody else has
// this way.
func loopbackRoute(r *attachment.Record, h *netlink.Handle) (repaired []string, err error) {
	if r.Mapper != attachment.MapperWeir || !r.HasFamily(netlink.FAMILY_V6) {
		return nil, nil
	}
	bridge, err := find1(h, r.Bridge)
	if err != nil {
		return nil, err
	}
	route := &netlink.Route{
		LinkIndex: bridge.Attrs().Index, Dst: &net.IPNet{IP: net.IPv6loopback, Mask: net.CIDRMask(128, 128)},
		Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Priority: 1 << 16, // lo's own comes first for what the node dials
	}
	err = h.RouteAdd(route)
	if errors.Is(err, unix.EEXIST) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("add route to ::1 by %s: %w", r.Bridge, err)
	}
	return []string{"route to ::1 by " + r.Bridge}, nil
}
