// SPDX-License-Identifier: MPL-2.0

package host

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/host/dump"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// A redirected connection has the own address that the route to the encoded
// range names. Where a namespace has several networks, which address is right
// depends on the origin: the range is then cut into slices, each with a route
// and a source of its own, and a table tells the programs which slice an origin
// belongs to. A workload with one network has one route and no such table.

const (
	maxSlices = 8

	// maxSourceRoutes is how many prefixes of a namespace's routing table are
	// looked at. What is more specific than those has the source of the prefix
	// around it.
	maxSourceRoutes = 128
)

// ownAddress is an address of the namespace.
type ownAddress struct {
	netip.Addr
	device    int
	usable    bool         // the kernel takes it for a source
	Broadcast []netip.Addr // of its network
}

// Routable are those of the addresses that are not link-local.
func Routable(addresses []netip.Addr) []netip.Addr {
	return slices.DeleteFunc(slices.Clone(addresses), netip.Addr.IsLinkLocalUnicast)
}

// OwnAddresses returns what is assigned to the devices of the namespace, which the
// calling thread is in, but for lo, sorted.
func (ns *Namespace) OwnAddresses() (own []ownAddress, err error) {
	list, err := ns.assigned()
	if err != nil {
		return nil, err
	}
	const unready = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED
	for _, entry := range list {
		addr, ok := netip.AddrFromSlice(entry.IP)
		if ok && entry.LinkIndex != LoIndex {
			addr = addr.Unmap()
			own = append(own, ownAddress{addr, entry.LinkIndex, addr.IsGlobalUnicast() && entry.Flags&unready == 0, broadcasts(entry)})
		}
	}
	slices.SortFunc(own, func(a, b ownAddress) int { return a.Compare(b.Addr) })
	return own, nil
}

// broadcasts are the addresses that the kernel takes for the broadcast address of
// an address's network: that of the prefix, and another where one was set.
func broadcasts(entry netlink.Addr) (list []netip.Addr) {
	addr, ok := netip.AddrFromSlice(entry.IP)
	bits, _ := entry.Mask.Size()
	if addr = addr.Unmap(); !ok || !addr.Is4() {
		return nil
	}
	if bits < 31 {
		list = append(list, lastOf(netip.PrefixFrom(addr, bits)))
	}
	if set, ok := netip.AddrFromSlice(entry.Broadcast); ok && !set.IsUnspecified() {
		list = append(list, set.Unmap())
	}
	return list
}

// FindSources asks the kernel by which device it sends, prefix by prefix. first
// are the addresses that the request names: the first of each family stands for
// its device and for all that no route decides.
func FindSources(own []ownAddress, first []netip.Addr) (s workload.Sources, err error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		devices, source := usableSources(own, first, family)
		if !source.IsValid() {
			continue
		}
		list := []netip.Addr{source}
		if slices.ContainsFunc(own, func(addr ownAddress) bool { return devices[addr.Addr] != 0 && addr.device != devices[source] }) {
			if list, err = findPrefixes(&s, family, source, devices); err != nil {
				return s, err
			}
		}
		if family == netlink.FAMILY_V4 {
			s.IPv4 = list
		} else {
			s.IPv6 = list
		}
	}
	return s, nil
}

// usableSources are the devices of a family's usable addresses, and the address that stands
// for the family: the first that the request names, else the first; not valid for none.
func usableSources(own []ownAddress, first []netip.Addr, family int) (devices map[netip.Addr]int, source netip.Addr) {
	devices = make(map[netip.Addr]int)
	for _, addr := range own {
		if !addr.usable || addr.Is4() != (family == netlink.FAMILY_V4) {
			continue
		}
		devices[addr.Addr] = addr.device
		if !source.IsValid() {
			source = addr.Addr
		}
	}
	if named := slices.IndexFunc(first, func(addr netip.Addr) bool { return devices[addr.Unmap()] != 0 }); named >= 0 {
		source = first[named].Unmap()
	}
	return devices, source
}

// findPrefixes adds the prefixes of one family whose source is not that of the
// prefix around them, and returns the sources by slice.
func findPrefixes(s *workload.Sources, family int, source netip.Addr, devices map[netip.Addr]int) (list []netip.Addr, err error) {
	routed, err := routedPrefixes(family)
	if err != nil {
		return nil, err
	}
	list = []netip.Addr{source}
	around := make([]netip.Addr, len(routed)) // the sources, by prefix
	for i, prefix := range routed {
		outer := source
		if j := innermost(routed[:i], prefix); j >= 0 {
			outer = around[j]
		}
		around[i] = outer
		probed, found := probeOf(prefix, routed[i+1:])
		if !found {
			continue // its parts decide
		}
		chosen, err := sourceFor(probed)
		if err != nil {
			return nil, err
		}
		if devices[chosen] == 0 {
			continue
		}
		if devices[chosen] == devices[source] {
			chosen = source
		}
		if chosen == outer {
			continue
		}
		slice := slices.Index(list, chosen)
		if slice < 0 {
			if slice = len(list); slice == maxSlices {
				continue
			}
			list = append(list, chosen)
		}
		around[i] = chosen
		s.Prefixes = append(s.Prefixes, workload.SourcePrefix{Prefix: prefix, Slice: uint32(slice)})
	}
	return list, nil
}

// innermost is the place of the longest prefix that covers another one; -1 for none. The
// list has shorter ones first.
func innermost(list []netip.Prefix, prefix netip.Prefix) int {
	for i, other := range slices.Backward(list) {
		if other.Overlaps(prefix) {
			return i
		}
	}
	return -1
}

// routedPrefixes are the destinations of the namespace's routes, shorter ones
// first.
func routedPrefixes(family int) ([]netip.Prefix, error) {
	prefixes := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
	if family == netlink.FAMILY_V6 {
		prefixes[0] = netip.MustParsePrefix("::/0")
	}
	routes, err := dump.List(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	for _, route := range routes {
		if route.Table == unix.RT_TABLE_LOCAL || route.Dst == nil || route.Type != unix.RTN_UNICAST {
			continue
		}
		addr, ok := netip.AddrFromSlice(route.Dst.IP)
		bits, _ := route.Dst.Mask.Size()
		addr = addr.Unmap()
		if ok && !addr.IsLinkLocalUnicast() && !addr.IsMulticast() && bits <= addr.BitLen() {
			prefixes = append(prefixes, netip.PrefixFrom(addr, bits).Masked())
		}
	}
	slices.SortFunc(prefixes, func(a, b netip.Prefix) int {
		if a.Bits() != b.Bits() {
			return a.Bits() - b.Bits()
		}
		return a.Addr().Compare(b.Addr())
	})
	prefixes = slices.Compact(prefixes)
	return prefixes[:min(len(prefixes), maxSourceRoutes)], nil
}

// probeOf returns an address of the prefix that is in none of the longer ones.
func probeOf(prefix netip.Prefix, longer []netip.Prefix) (netip.Addr, bool) {
	candidates := []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8::1"),
		prefix.Addr().Next(), prefix.Addr()}
	for _, inner := range longer {
		candidates = append(candidates, lastOf(inner).Next(), inner.Addr().Prev())
	}
	i := slices.IndexFunc(candidates, func(addr netip.Addr) bool {
		return addr.IsValid() && prefix.Contains(addr) && addr.IsGlobalUnicast() &&
			!slices.ContainsFunc(longer, func(inner netip.Prefix) bool { return inner.Contains(addr) })
	})
	if i < 0 {
		return netip.Addr{}, false
	}
	return candidates[i], true
}

// lastOf is the last address of a prefix.
func lastOf(prefix netip.Prefix) netip.Addr {
	bytes := prefix.Masked().Addr().AsSlice()
	for bit := prefix.Bits(); bit < 8*len(bytes); bit++ {
		bytes[bit/8] |= 0x80 >> (bit % 8)
	}
	last, _ := netip.AddrFromSlice(bytes)
	return last
}

// sourceFor is the own address that the kernel chooses towards a destination;
// none where nothing leads there.
func sourceFor(destination netip.Addr) (source netip.Addr, err error) {
	routes, err := netlink.RouteGet(destination.AsSlice())
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EACCES), errors.Is(err, unix.EINVAL):
		return source, nil
	case err != nil:
		return source, fmt.Errorf("ask for the route to %s: %w", destination, err)
	case len(routes) == 0:
		return source, nil
	}
	source, _ = netip.AddrFromSlice(routes[0].Src)
	return source.Unmap(), nil
}
