// SPDX-License-Identifier: MPL-2.0

package bpfmap

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"github.com/weirmesh/weir/redirect/workload"
)

// This file is the only one that knows the layout of the rows. An address is
// 16 bytes in network order, IPv4 mapped; a port is in host order.

// Each as the header in bpf/ has it that defines the name behind it.
const (
	ListenerSlots = 64            // LISTENER_SLOTS
	GateSlot      = ListenerSlots // GATE_SLOT: of no proxy, see redirect.Gate
	FlowSlots     = 128           // FLOW_SLOTS
	IndexFirst    = 1             // INDEX_FIRST

	PortsPerRow  = 1024 // PORTS_PER_ROW
	OriginShare  = 128  // ORIGIN_SHARE
	indexesGiven = 0    // INDEXES_GIVEN
	IndexesFreed = 1    // INDEXES_FREED

	listensOutbound  = 1 << 8  // LISTENS_OUTBOUND
	listensExposed   = 1 << 9  // LISTENS_EXPOSED
	ProxyListensHere = 1 << 16 // PROXY_LISTENS_HERE
)

func EncodeAddr(addr netip.Addr) (row BpfAddr) {
	bytes := addr.As16()
	for i := range row.Word {
		row.Word[i] = binary.NativeEndian.Uint32(bytes[4*i:])
	}
	return row
}

func DecodeAddr(row BpfAddr) netip.Addr {
	var bytes [16]byte
	for i, word := range row.Word {
		binary.NativeEndian.PutUint32(bytes[4*i:], word)
	}
	return netip.AddrFrom16(bytes).Unmap()
}

func DecodeAddrPort(row BpfAddr, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(DecodeAddr(row), port)
}

// rows is one generation of a workload, ready to be written.
type rows struct {
	config     BpfConfig
	exclusions map[BpfExclusionKey]uint32
	ports      map[BpfExclusionKey]BpfPorts
	addresses  map[BpfAddressKey]BpfAddress
	cidrs      map[BpfCidrKey]uint32 // the family that the prefix was written in
	sources    map[BpfCidrKey]uint32 // the slice of the encoded range
}

// EncodeRows is the pure function from a workload to its rows. ipv6 says that
// the encoded IPv6 range is routed in the namespace.
func EncodeRows(w workload.Workload, cookie, generation uint64, ipv6 bool) rows {
	r := rows{
		config: BpfConfig{
			ProxyUid:     w.ProxyUID,
			Budget:       w.Budget,
			OutboundPort: w.OutboundPort,
			InboundPort:  w.InboundPort,

			EphemeralFirst: w.Ephemeral.First,
			EphemeralLast:  w.Ephemeral.Last,

			Seat:  w.ProxyID(0),
			Seats: w.TakenProxyIDs(),
		},
		exclusions: make(map[BpfExclusionKey]uint32),
		ports:      make(map[BpfExclusionKey]BpfPorts),
		addresses:  make(map[BpfAddressKey]BpfAddress),
		cidrs:      make(map[BpfCidrKey]uint32),
		sources:    make(map[BpfCidrKey]uint32),
	}
	flag := func(set bool, bit BpfConfigFlag) {
		if set {
			r.config.Flags |= bit
		}
	}
	of := owner{rows: r, cookie: cookie, generation: generation}
	of.addProxies(w) // first: what is of no proxy overwrites it
	of.excludePorts(BpfExclusionKindEXCLUSION_PORT_OUT, w.ExcludeOutboundPorts)
	of.excludePorts(BpfExclusionKindEXCLUSION_PORT_IN, w.ExcludeInboundPorts)
	for _, uid := range w.ExcludeUIDs {
		of.mean(BpfExclusionKindEXCLUSION_UID, uid, 0)
	}
	of.addAddresses(w)
	for _, cidr := range w.ExcludeOutboundCIDRs {
		r.cidrs[EncodeCIDR(cidr, cookie, generation)] = CidrFamily(cidr)
	}
	for _, source := range w.Sources.Prefixes {
		r.sources[EncodeCIDR(source.Prefix, cookie, generation)] = source.Slice
	}
	encodeDNS(w.DNS, &r.config)
	flag(w.Mode == workload.ModeTransparent, BpfConfigFlagCONFIG_TRANSPARENT)
	flag(len(w.ExcludeOutboundPorts) > 0, BpfConfigFlagCONFIG_PORTS_OUT)
	flag(len(w.Proxies) > 0, BpfConfigFlagCONFIG_PROXIES)
	flag(len(w.Exposed()) > 0, BpfConfigFlagCONFIG_LISTENERS)
	flag(len(w.ExcludeInboundPorts) > 0, BpfConfigFlagCONFIG_PORTS_IN)
	flag(len(w.ExcludeUIDs) > 0, BpfConfigFlagCONFIG_UIDS)
	flag(len(w.ExcludeOutboundCIDRs) > 0, BpfConfigFlagCONFIG_CIDRS)
	flag(w.Sources.Sliced(), BpfConfigFlagCONFIG_SOURCES)
	flag(ipv6, BpfConfigFlagCONFIG_IPV6)
	flag(w.Guard == workload.GuardAudit, BpfConfigFlagCONFIG_AUDIT)
	flag(w.Guard == workload.GuardEnforce, BpfConfigFlagCONFIG_ENFORCE)
	flag(w.Egress == workload.GuardAudit, BpfConfigFlagCONFIG_EGRESS_AUDIT)
	flag(w.Egress == workload.GuardEnforce, BpfConfigFlagCONFIG_EGRESS_ENFORCE)
	flag(w.Forward, BpfConfigFlagCONFIG_FORWARD)
	return r
}

// owner are the rows of one generation of one workload, whose keys begin with both.
type owner struct {
	rows
	cookie, generation uint64
}

func (o owner) mean(kind BpfExclusionKind, value, meaning uint32) {
	o.exclusions[BpfExclusionKey{Cookie: o.cookie, Generation: o.generation, Kind: kind, Value: value}] = meaning
}

func (o owner) address(addr netip.Addr, row BpfAddress) {
	o.addresses[BpfAddressKey{Cookie: o.cookie, Generation: o.generation, Addr: EncodeAddr(addr)}] = row
}

func (o owner) excludePorts(kind BpfExclusionKind, ports []uint16) {
	for _, port := range ports {
		key := BpfExclusionKey{Cookie: o.cookie, Generation: o.generation, Kind: kind, Value: uint32(port) / PortsPerRow}
		row := o.ports[key]
		row.Bits[port%PortsPerRow/64] |= 1 << (port % 64)
		o.ports[key] = row
	}
}

// addProxies adds what the proxies have: of two that claim the same the former has it, so
// the last one comes first. Exposed ports overwrite those of the mesh.
func (o owner) addProxies(w workload.Workload) {
	for i := len(w.Proxies) - 1; i >= 0; i-- {
		p, proxyID := w.Proxies[i], uint32(w.ProxyID(i+1))
		for _, addr := range p.VirtualIPs {
			o.address(addr, BpfAddress{Kind: BpfAddressKindADDRESS_PROXY, Port: p.OutboundPort, Seat: uint16(proxyID)})
		}
		for _, port := range p.ServicePorts {
			o.mean(BpfExclusionKindEXCLUSION_SERVICE, uint32(port), uint32(p.InboundPort))
		}
		if p.OutboundPort != 0 {
			o.mean(BpfExclusionKindEXCLUSION_LISTENER, uint32(p.OutboundPort), proxyID|listensOutbound)
		}
		if p.InboundPort != 0 {
			o.mean(BpfExclusionKindEXCLUSION_LISTENER, uint32(p.InboundPort), proxyID)
		}
	}
	for _, p := range w.All() {
		if p.InboundPort != 0 && len(w.Proxies) > 0 {
			o.mean(BpfExclusionKindEXCLUSION_SERVICE, uint32(p.InboundPort), uint32(p.InboundPort))
		}
	}
	for _, p := range w.Exposed() {
		o.mean(BpfExclusionKindEXCLUSION_SERVICE, uint32(p.Port), uint32(p.Port)|ProxyListensHere)
		o.mean(BpfExclusionKindEXCLUSION_LISTENER, uint32(p.Port), uint32(p.ProxyID)|listensExposed)
	}
}

// addAddresses adds those of no proxy, the workload's own last: nothing overwrites them.
func (o owner) addAddresses(w workload.Workload) {
	for _, addr := range w.Broadcasts {
		o.address(addr, BpfAddress{Kind: BpfAddressKindADDRESS_BROADCAST})
	}
	for slice, addr := range w.Sources.IPv6 {
		_, first := workload.EncodedAddrs(uint32(slice) << workload.SliceShift)
		o.address(first, BpfAddress{Kind: BpfAddressKindADDRESS_SOURCE, Listener: EncodeAddr(addr)})
	}
	for _, upstream := range w.Upstreams {
		row := BpfAddress{
			Kind: BpfAddressKindADDRESS_UPSTREAM, Port: upstream.Listener.Port(), Listener: EncodeAddr(upstream.Listener.Addr()),
		}
		for _, addr := range upstream.Addresses {
			o.address(addr, row)
		}
	}
	for _, addr := range w.Addresses {
		o.address(addr, BpfAddress{Kind: BpfAddressKindADDRESS_OWN})
	}
}

func encodeDNS(dns workload.DNS, config *BpfConfig) {
	addr, port := dns.Address, dns.Port
	switch {
	case !addr.IsValid() && port == 0:
		return
	case port == 0:
		port = workload.DefaultDNSPort
		config.Flags |= BpfConfigFlagCONFIG_DNS | BpfConfigFlagCONFIG_DNS_ANY
	case !addr.IsValid():
		addr = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		config.Flags |= BpfConfigFlagCONFIG_DNS
	default:
		config.Flags |= BpfConfigFlagCONFIG_DNS
	}
	config.DnsAddr, config.DnsPort = EncodeAddr(addr), port
}

// CidrFamily keeps ::/0 from excluding IPv4, which is a part of it once it is
// mapped: 4 or 6.
func CidrFamily(cidr netip.Prefix) uint32 {
	if cidr.Addr().Is4() || cidr.Addr().Is4In6() && cidr.Bits() >= 96 {
		return 4
	}
	return 6
}

// EncodeCIDR puts the workload in front of the prefix: the trie matches it as
// the first 128 bits.
func EncodeCIDR(cidr netip.Prefix, cookie, generation uint64) BpfCidrKey {
	bits := cidr.Bits()
	if cidr.Addr().Is4() {
		bits += 96
	}
	key := BpfCidrKey{Prefixlen: uint32(128 + bits), Addr: EncodeAddr(cidr.Addr())}
	scope := (*[4]uint32)(unsafe.Pointer(&[2]uint64{cookie, generation}))
	key.Scope = *scope
	return key
}
