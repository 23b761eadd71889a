// SPDX-License-Identifier: MPL-2.0

package workload

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

// EncodedPrefix4 and EncodedPrefix6 are the ranges that carry an index, as
// bpf/addr.h has them. Both are routed to lo in every workload.
var EncodedPrefix4 = netip.MustParsePrefix("127.128.0.0/9")

var EncodedPrefix6 = netip.MustParsePrefix("fd77:6569:7200::/96")

var LoopbackPrefix4 = netip.MustParsePrefix("127.0.0.0/8")

var LoopbackPrefix6 = netip.MustParsePrefix("::1/128")

// EncodedAddrs are the addresses that an index has in the two ranges.
func EncodedAddrs(index uint32) (v4, v6 netip.Addr) {
	b4 := EncodedPrefix4.Addr().As4()
	binary.BigEndian.PutUint32(b4[:], binary.BigEndian.Uint32(b4[:])+index)
	b6 := EncodedPrefix6.Addr().As16()
	binary.BigEndian.PutUint32(b6[12:], index)
	return netip.AddrFrom4(b4), netip.AddrFrom16(b6)
}

// DecodeIndex returns the index that an address of either range carries.
func DecodeIndex(addr netip.Addr) (index uint32, encoded bool) {
	addr = addr.Unmap()
	if EncodedPrefix4.Contains(addr) {
		bytes := addr.As4()
		return binary.BigEndian.Uint32(bytes[:]) &^ 0xff800000, true
	}
	bytes := addr.As16()
	return binary.BigEndian.Uint32(bytes[12:]), EncodedPrefix6.Contains(addr)
}

const SliceShift = 20 // SLICE_SHIFT

// Sources says which own address a connection of a workload has.
type Sources struct {
	// IPv4 and IPv6 are the addresses of the slices; the first is that of
	// whatever no prefix covers.
	IPv4     []netip.Addr   `json:"ipv4,omitempty"`
	IPv6     []netip.Addr   `json:"ipv6,omitempty"`
	Prefixes []SourcePrefix `json:"prefixes,omitempty"`
}

// SourcePrefix names the slice of the origins in a prefix.
type SourcePrefix struct {
	Prefix netip.Prefix `json:"prefix"`
	Slice  uint32       `json:"slice"`
}

func (s Sources) Equal(other Sources) bool {
	return slices.Equal(s.IPv4, other.IPv4) && slices.Equal(s.IPv6, other.IPv6) && slices.Equal(s.Prefixes, other.Prefixes)
}

// Sliced reports whether any origin belongs to another slice than the first.
func (s Sources) Sliced() bool { return len(s.Prefixes) > 0 }

// SlicePrefixes are the parts of the encoded ranges that belong to a slice.
func SlicePrefixes(slice int) (v4, v6 netip.Prefix) {
	a4, a6 := EncodedAddrs(uint32(slice) << SliceShift)
	return netip.PrefixFrom(a4, 32-SliceShift), netip.PrefixFrom(a6, 128-SliceShift)
}
