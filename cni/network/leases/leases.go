// SPDX-License-Identifier: MPL-2.0

package leases

import (
	"errors"
	"fmt"
	"iter"
	"net"
	"net/netip"
	"strconv"

	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/plugins/plugins/ipam/host-local/backend/disk"
)

// ErrFull: all addresses of a set of ranges are taken. Its text is that of the reference plugin.
var ErrFull = errors.New("no IP addresses available")

// Take takes an address of the n-th set of ranges: the wanted one, or where that is not
// valid the next one after that which was taken last, so that an address rests for long.
// An interface that has one of the set already is refused another, unless the caller
// knows that it is fresh: to find out, all leases of the node are read.
func (c *Config) Take(files *disk.Store, n int, id, ifname string, wanted netip.Addr, fresh bool) (ip *current.IPConfig, err error) {
	if err := files.Lock(); err != nil {
		return nil, fmt.Errorf("lock leases: %w", err)
	}
	defer func() { err = errors.Join(err, files.Unlock()) }()
	set, number := c.Sets[n], strconv.Itoa(n)
	if wanted.IsValid() {
		place := set.at(wanted)
		if place < 0 {
			return nil, fmt.Errorf("%s is not in %s", wanted, set)
		}
		if wanted == set[place].Gateway {
			return nil, fmt.Errorf("%s is the gateway of its subnet", wanted)
		}
		reserved, err := files.Reserve(id, ifname, wanted.AsSlice(), number)
		if err == nil && !reserved {
			err = fmt.Errorf("%s is taken", wanted)
		}
		return set[place].config(wanted), err
	}
	var known []net.IP
	if !fresh {
		known = files.GetByID(id, ifname)
	}
	for _, held := range known {
		if set.Contains(addrOf(held)) {
			return nil, fmt.Errorf("%s is taken by %s already", held, id)
		}
	}
	last := netip.Addr{}
	if ip, err := files.LastReservedIP(number); err == nil {
		last = addrOf(ip)
	}
	for addr, r := range set.after(last) {
		reserved, err := files.Reserve(id, ifname, addr.AsSlice(), number)
		if err != nil || reserved {
			return r.config(addr), err
		}
	}
	return nil, fmt.Errorf("%w in %s", ErrFull, set)
}

func (r Range) config(addr netip.Addr) *current.IPConfig {
	return &current.IPConfig{
		Address: net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(r.Subnet.Bits(), addr.BitLen())},
		Gateway: r.Gateway.AsSlice(),
	}
}

// after are all addresses of the set but the gateways, in turn from behind the last one
// on; from the first one on where last is in no range.
func (s Set) after(last netip.Addr) iter.Seq2[netip.Addr, Range] {
	return func(yield func(netip.Addr, Range) bool) {
		place, addr := 0, s[0].First
		if at := s.at(last); at >= 0 {
			place, addr = s.next(at, last)
		}
		for start := addr; ; {
			if addr != s[place].Gateway && !yield(addr, s[place]) {
				return
			}
			if place, addr = s.next(place, addr); addr == start {
				return
			}
		}
	}
}

// next is the address behind another one, and the place of its range.
func (s Set) next(place int, addr netip.Addr) (int, netip.Addr) {
	if addr != s[place].Last {
		return place, addr.Next()
	}
	place = (place + 1) % len(s)
	return place, s[place].First
}

// Free gives back what an interface has, of all sets.
func Free(files *disk.Store, id, ifname string) (err error) {
	if err := files.Lock(); err != nil {
		return fmt.Errorf("lock leases: %w", err)
	}
	defer func() { err = errors.Join(err, files.Unlock()) }()
	return files.ReleaseByID(id, ifname)
}
