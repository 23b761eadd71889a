// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/binary"
	"net/netip"
	"unsafe"
)

// This file is the only one that knows the layout of the rows. An address is
// 16 bytes in network order, IPv4 mapped; a port is in host order.

// encodedPrefix4 and encodedPrefix6 are the ranges that carry an index, as
// ../bpf/addr.h has them. Both are routed to lo in every workload.
const (
	listenerSlots = 64  // LISTENER_SLOTS
	flowSlots     = 128 // FLOW_SLOTS
	indexFirst    = 1   // INDEX_FIRST

	portsPerRow  = 1024 // PORTS_PER_ROW
	originShare  = 128  // ORIGIN_SHARE
	indexesGiven = 0    // INDEXES_GIVEN
	indexesFreed = 1    // INDEXES_FREED

	listensOutbound  = 1 << 8  // LISTENS_OUTBOUND
	listensExposed   = 1 << 9  // LISTENS_EXPOSED
	proxyListensHere = 1 << 16 // PROXY_LISTENS_HERE
)

func encodeAddr(addr netip.Addr) (row bpfAddr) {
	bytes := addr.As16()
	for i := range row.Word {
		row.Word[i] = binary.NativeEndian.Uint32(bytes[4*i:])
	}
	return row
}

func decodeAddr(row bpfAddr) netip.Addr {
	var bytes [16]byte
	for i, word := range row.Word {
		binary.NativeEndian.PutUint32(bytes[4*i:], word)
	}
	return netip.AddrFrom16(bytes).Unmap()
}

func decodeAddrPort(row bpfAddr, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(decodeAddr(row), port)
}

// rows is one generation of a workload, ready to be written.
type rows struct {
	config     bpfConfig
	exclusions map[bpfExclusionKey]uint32
	ports      map[bpfExclusionKey]bpfPorts
	addresses  map[bpfAddressKey]bpfAddress
	cidrs      map[bpfCidrKey]uint32 // the family that the prefix was written in
	sources    map[bpfCidrKey]uint32 // the slice of the encoded range
}

// encodeRows is the pure function from a workload to its rows. ipv6 says that
// the encoded IPv6 range is routed in the namespace.
func encodeRows(w Workload, cookie, generation uint64, ipv6 bool) rows {
	r := rows{
		config: bpfConfig{
			ProxyUid:     w.ProxyUID,
			Budget:       w.Budget,
			OutboundPort: w.OutboundPort,
			InboundPort:  w.InboundPort,

			EphemeralFirst: w.Ephemeral.First,
			EphemeralLast:  w.Ephemeral.Last,

			Seat:  w.proxyID(0),
			Seats: w.takenProxyIDs(),
		},
		exclusions: make(map[bpfExclusionKey]uint32),
		ports:      make(map[bpfExclusionKey]bpfPorts),
		addresses:  make(map[bpfAddressKey]bpfAddress),
		cidrs:      make(map[bpfCidrKey]uint32),
		sources:    make(map[bpfCidrKey]uint32),
	}
	flag := func(set bool, bit bpfConfigFlag) {
		if set {
			r.config.Flags |= bit
		}
	}
	mean := func(kind bpfExclusionKind, value, meaning uint32) {
		r.exclusions[bpfExclusionKey{Cookie: cookie, Generation: generation, Kind: kind, Value: value}] = meaning
	}
	excludePorts := func(kind bpfExclusionKind, ports []uint16) {
		for _, port := range ports {
			key := bpfExclusionKey{Cookie: cookie, Generation: generation, Kind: kind, Value: uint32(port) / portsPerRow}
			row := r.ports[key]
			row.Bits[port%portsPerRow/64] |= 1 << (port % 64)
			r.ports[key] = row
		}
	}
	// What comes later overwrites: the last proxy first, then what goes before any proxy.
	for i := len(w.Proxies) - 1; i >= 0; i-- {
		p, proxyID := w.Proxies[i], uint32(w.proxyID(i+1))
		for _, addr := range p.VirtualIPs {
			r.addresses[bpfAddressKey{Cookie: cookie, Generation: generation, Addr: encodeAddr(addr)}] = bpfAddress{
				Kind: bpfAddressKindADDRESS_PROXY, Port: p.OutboundPort, Seat: uint16(proxyID),
			}
		}
		for _, port := range p.ServicePorts {
			mean(bpfExclusionKindEXCLUSION_SERVICE, uint32(port), uint32(p.InboundPort))
		}
		if p.OutboundPort != 0 {
			mean(bpfExclusionKindEXCLUSION_LISTENER, uint32(p.OutboundPort), proxyID|listensOutbound)
		}
		if p.InboundPort != 0 {
			mean(bpfExclusionKindEXCLUSION_LISTENER, uint32(p.InboundPort), proxyID)
		}
	}
	for _, p := range w.all() {
		if p.InboundPort != 0 && len(w.Proxies) > 0 {
			mean(bpfExclusionKindEXCLUSION_SERVICE, uint32(p.InboundPort), uint32(p.InboundPort))
		}
	}
	exposed := w.exposed()
	for _, p := range exposed {
		mean(bpfExclusionKindEXCLUSION_SERVICE, uint32(p.port), uint32(p.port)|proxyListensHere)
		mean(bpfExclusionKindEXCLUSION_LISTENER, uint32(p.port), uint32(p.proxyID)|listensExposed)
	}
	excludePorts(bpfExclusionKindEXCLUSION_PORT_OUT, w.ExcludeOutboundPorts)
	excludePorts(bpfExclusionKindEXCLUSION_PORT_IN, w.ExcludeInboundPorts)
	for _, uid := range w.ExcludeUIDs {
		mean(bpfExclusionKindEXCLUSION_UID, uid, 0)
	}
	for _, cidr := range w.ExcludeOutboundCIDRs {
		r.cidrs[encodeCIDR(cidr, cookie, generation)] = cidrFamily(cidr)
	}
	for _, source := range w.Sources.Prefixes {
		r.sources[encodeCIDR(source.Prefix, cookie, generation)] = source.Slice
	}
	for _, addr := range w.Broadcasts {
		r.addresses[bpfAddressKey{Cookie: cookie, Generation: generation, Addr: encodeAddr(addr)}] = bpfAddress{
			Kind: bpfAddressKindADDRESS_BROADCAST,
		}
	}
	for slice, addr := range w.Sources.IPv6 {
		_, first := encodedAddrs(uint32(slice) << sliceShift)
		r.addresses[bpfAddressKey{Cookie: cookie, Generation: generation, Addr: encodeAddr(first)}] = bpfAddress{
			Kind: bpfAddressKindADDRESS_SOURCE, Listener: encodeAddr(addr),
		}
	}
	for _, upstream := range w.Upstreams {
		for _, addr := range upstream.Addresses {
			r.addresses[bpfAddressKey{Cookie: cookie, Generation: generation, Addr: encodeAddr(addr)}] = bpfAddress{
				Kind:     bpfAddressKindADDRESS_UPSTREAM,
				Port:     upstream.Listener.Port(),
				Listener: encodeAddr(upstream.Listener.Addr()),
			}
		}
	}
	for _, addr := range w.Addresses {
		r.addresses[bpfAddressKey{Cookie: cookie, Generation: generation, Addr: encodeAddr(addr)}] = bpfAddress{
			Kind: bpfAddressKindADDRESS_OWN,
		}
	}
	encodeDNS(w.DNS, &r.config)
	flag(w.Mode == ModeTransparent, bpfConfigFlagCONFIG_TRANSPARENT)
	flag(len(w.ExcludeOutboundPorts) > 0, bpfConfigFlagCONFIG_PORTS_OUT)
	flag(len(w.Proxies) > 0, bpfConfigFlagCONFIG_PROXIES)
	flag(len(exposed) > 0, bpfConfigFlagCONFIG_LISTENERS)
	flag(len(w.ExcludeInboundPorts) > 0, bpfConfigFlagCONFIG_PORTS_IN)
	flag(len(w.ExcludeUIDs) > 0, bpfConfigFlagCONFIG_UIDS)
	flag(len(w.ExcludeOutboundCIDRs) > 0, bpfConfigFlagCONFIG_CIDRS)
	flag(w.Sources.sliced(), bpfConfigFlagCONFIG_SOURCES)
	flag(ipv6, bpfConfigFlagCONFIG_IPV6)
	flag(w.Guard == GuardAudit, bpfConfigFlagCONFIG_AUDIT)
	flag(w.Guard == GuardEnforce, bpfConfigFlagCONFIG_ENFORCE)
	flag(w.Forward, bpfConfigFlagCONFIG_FORWARD)
	return r
}

func encodeDNS(dns DNS, config *bpfConfig) {
	addr, port := dns.Address, dns.Port
	switch {
	case !addr.IsValid() && port == 0:
		return
	case port == 0:
		port = DefaultDNSPort
		config.Flags |= bpfConfigFlagCONFIG_DNS | bpfConfigFlagCONFIG_DNS_ANY
	case !addr.IsValid():
		addr = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		config.Flags |= bpfConfigFlagCONFIG_DNS
	default:
		config.Flags |= bpfConfigFlagCONFIG_DNS
	}
	config.DnsAddr, config.DnsPort = encodeAddr(addr), port
}

// cidrFamily keeps ::/0 from excluding IPv4, which is a part of it once it is
// mapped: 4 or 6.
func cidrFamily(cidr netip.Prefix) uint32 {
	if cidr.Addr().Is4() || cidr.Addr().Is4In6() && cidr.Bits() >= 96 {
		return 4
	}
	return 6
}

// encodeCIDR puts the workload in front of the prefix: the trie matches it as
// the first 128 bits.
func encodeCIDR(cidr netip.Prefix, cookie, generation uint64) bpfCidrKey {
	bits := cidr.Bits()
	if cidr.Addr().Is4() {
		bits += 96
	}
	key := bpfCidrKey{Prefixlen: uint32(128 + bits), Addr: encodeAddr(cidr.Addr())}
	scope := (*[4]uint32)(unsafe.Pointer(&[2]uint64{cookie, generation}))
	key.Scope = *scope
	return key
}
