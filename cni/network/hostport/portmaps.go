// SPDX-License-Identifier: MPL-2.0

package hostport

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/cni/network/nft"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// Host ports are elements of maps and no rules: a packet costs the same beside
// one allocation as beside a thousand, and so does an ADD.
//
//	map hostports4     { type inet_proto . ipv4_addr . inet_service : ipv4_addr . inet_service; }
//	map hostports4_any { type inet_proto . inet_service : ipv4_addr . inet_service; }
//	chain hostports {
//		meta nfproto ipv4 dnat ip to meta l4proto . ip daddr . th dport map @hostports4
//		meta nfproto ipv4 dnat ip to meta l4proto . th dport map @hostports4_any
//	}
//
// and the same for IPv6. prerouting and output jump there for the node's own addresses.

// portMap is one of the maps: of a family, with the host's address in the key or without.
type portMap struct {
	set  *nftables.Set
	four bool
	any  bool // for all of the node's addresses
}

// portChain is there where the maps are.
const portChain = "hostports"

// Registers of 32 bits, as nft counts them; the first is also that of 128 bits.
const (
	firstRegister = 1
	register32    = 8
)

func portMaps() []portMap {
	var list []portMap
	for _, four := range []bool{true, false} {
		address, name := nftables.TypeIP6Addr, "hostports6"
		if four {
			address, name = nftables.TypeIPAddr, "hostports4"
		}
		value := nftables.MustConcatSetType(address, nftables.TypeInetService)
		one := nftables.MustConcatSetType(nftables.TypeInetProto, address, nftables.TypeInetService)
		all := nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
		list = append(list,
			portMap{four: four, set: &nftables.Set{Table: nft.OwnTable(), Name: name, IsMap: true, Concatenation: true, KeyType: one, DataType: value}},
			portMap{four: four, any: true, set: &nftables.Set{Table: nft.OwnTable(), Name: name + "_any", IsMap: true, Concatenation: true, KeyType: all, DataType: value}})
	}
	return list
}

// elements are those of the ports that belong into the map, under the owner's name.
func (m portMap) elements(ports []attachment.Port, owner workload.AttachmentID) (list []nftables.SetElement) {
	for _, p := range ports {
		if p.Host.Addr().Is4() != m.four || p.Host.Addr().IsUnspecified() != m.any {
			continue
		}
		key := []byte{p.Protocol, 0, 0, 0}
		if !m.any {
			key = append(key, p.Host.Addr().AsSlice()...)
		}
		list = append(list, nftables.SetElement{
			Key:     append(key, portOf(p.Host.Port())...),
			Val:     append(p.Container.Addr().AsSlice(), portOf(p.Container.Port())...),
			Comment: owner.ContainerID + " " + owner.IfName,
		})
	}
	return list
}

// decode reads an element as elements writes it.
func (m portMap) decode(element nftables.SetElement) (held HeldPort, ok bool) {
	size, host := 16, netip.IPv6Unspecified()
	if m.four {
		size, host = 4, netip.IPv4Unspecified()
	}
	key, value := element.Key, element.Val
	if len(value) < size+4 || len(key) < 8 || !m.any && len(key) < 8+size {
		return held, false
	}
	held.Protocol = key[0]
	key = key[4:]
	if !m.any {
		host, _ = netip.AddrFromSlice(key[:size])
		key = key[size:]
	}
	container, _ := netip.AddrFromSlice(value[:size])
	held.Host = netip.AddrPortFrom(host, binary.BigEndian.Uint16(key))
	held.Container = netip.AddrPortFrom(container, binary.BigEndian.Uint16(value[size:]))
	id, ifName, _ := strings.Cut(strings.TrimRight(element.Comment, "\x00"), " ")
	held.Owner = workload.AttachmentID{ContainerID: id, IfName: ifName}
	return held, true
}

// translate looks a packet up in the map and sends it where the map says.
func (m portMap) translate() []expr.Any {
	length, offset, family, proto := uint32(16), uint32(24), uint32(unix.NFPROTO_IPV6), byte(unix.NFPROTO_IPV6)
	if m.four {
		length, offset, family, proto = 4, 16, unix.NFPROTO_IPV4, unix.NFPROTO_IPV4
	}
	exprs := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: firstRegister},
		&expr.Cmp{Op: expr.CmpOpEq, Register: firstRegister, Data: []byte{proto}},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: firstRegister},
	}
	next := uint32(register32 + 1)
	if !m.any {
		exprs = append(exprs, &expr.Payload{DestRegister: next, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length})
		next += length / 4
	}
	return append(exprs,
		&expr.Payload{DestRegister: next, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: firstRegister, DestRegister: firstRegister, IsDestRegSet: true, SetName: m.set.Name},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: family, RegAddrMin: firstRegister, RegProtoMin: register32 + length/4},
	)
}

// EnsurePortMaps makes the maps and the chains that use them, where they are not.
func EnsurePortMaps(conn *nftables.Conn) (repaired []string, err error) {
	table := nft.OwnTable()
	chain := &nftables.Chain{Name: portChain, Table: table}
	hooks := []*nftables.Chain{
		{Name: "prerouting", Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest},
		{Name: "output", Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest},
	}
	present, err := nft.RulesOf(conn, table, chain)
	if err != nil {
		return nil, err
	}
	complete := len(present) == len(portMaps())
	for _, hook := range hooks {
		rules, err := nft.RulesOf(conn, table, hook)
		if err != nil {
			return nil, err
		}
		complete = complete && len(rules) == 1
	}
	if complete {
		return nil, nil
	}
	conn.AddTable(table)
	conn.AddChain(chain)
	conn.FlushChain(chain)
	for _, m := range portMaps() {
		if err := conn.AddSet(m.set, nil); err != nil {
			return nil, err
		}
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: m.translate()})
	}
	for _, hook := range hooks {
		conn.AddChain(hook)
		conn.FlushChain(hook)
		conn.AddRule(&nftables.Rule{Table: table, Chain: hook, Exprs: []expr.Any{
			&expr.Fib{Register: firstRegister, FlagDADDR: true, ResultADDRTYPE: true},
			&expr.Cmp{Op: expr.CmpOpEq, Register: firstRegister, Data: []byte{unix.RTN_LOCAL, 0, 0, 0}},
			&expr.Verdict{Kind: expr.VerdictJump, Chain: chain.Name},
		}})
	}
	if err := conn.Flush(); err != nil {
		return nil, fmt.Errorf("make the maps of host ports in table inet %s: %w", nft.Table, nft.Taken(err))
	}
	return []string{"maps of host ports"}, nil
}

// ServesAllBridges reports a chain of ensurePortMaps.
func ServesAllBridges(chain *nftables.Chain) bool {
	return slices.Contains([]string{portChain, "prerouting", "output"}, chain.Name)
}

// LoopbackRules let the node itself use its host ports by loopback: such a
// connection leaves with the bridge's address. An allocation that forges a
// destination in loopback, which route_localnet would let in, is stopped.
func LoopbackRules(r *attachment.Record) (masquerade, stop []nft.Rule) {
	for _, loopback := range []*net.IPNet{
		{IP: net.IPv4(127, 0, 0, 0).To4(), Mask: net.CIDRMask(8, 32)},
		{IP: net.IPv6loopback, Mask: net.CIDRMask(128, 128)},
	} {
		exprs := slices.Concat(nft.Family(loopback), nft.Address(loopback, nft.Source, expr.CmpOpEq),
			nft.Device(expr.MetaKeyOIFNAME, r.Bridge, expr.CmpOpEq), nft.Conntrack(expr.CtKeySTATUS, nft.CtStatusDNAT))
		masquerade = append(masquerade, nft.Rule{Comment: fmt.Sprintf("weir: from %s into %s", loopback, r.Bridge), Exprs: append(exprs, &expr.Counter{}, &expr.Masq{})})
		exprs = slices.Concat(nft.Family(loopback), nft.Device(expr.MetaKeyIIFNAME, r.Bridge, expr.CmpOpEq), nft.Address(loopback, nft.Destination, expr.CmpOpEq))
		stop = append(stop, nft.Rule{Comment: fmt.Sprintf("weir: to %s out of %s", loopback, r.Bridge), Exprs: append(exprs, &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop})})
	}
	return masquerade, stop
}

func StopChain(table *nftables.Table) *nftables.Chain {
	return &nftables.Chain{
		Name: "raw_prerouting", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw,
	}
}
