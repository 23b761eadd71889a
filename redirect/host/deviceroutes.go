// SPDX-License-Identifier: MPL-2.0

package host

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/host/dump"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// A route to lo is not found for a socket that is bound to another device, which
// a task may do when it is connected already: its packets to the encoded ranges,
// to loopback or to an own address would leave by that device. IPv4 even takes
// every address for a neighbour there where no route leads to it, so a route of
// type unreachable does not help. A local route by way of the device keeps them
// in the namespace, and the connection goes on.

// deviceMetric is the metric of these routes less the device's index. It lies
// above those of the routes that sockets without a device take.
const deviceMetric = 1 << 20

// deviceRoutes are what each device of the namespace needs beside the routes that
// are there.
func (ns *Namespace) deviceRoutes(ipv6 bool) (routes []*netlink.Route, err error) {
	links, err := dump.List(ns.netlink().LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	assigned, err := ns.assigned()
	if err != nil {
		return nil, err
	}
	for _, device := range links {
		index := device.Attrs().Index
		if index == LoIndex || device.Attrs().Flags&unix.IFF_UP == 0 {
			continue
		}
		inside := []netip.Prefix{workload.LoopbackPrefix4}
		if ipv6 {
			inside = append(inside, workload.LoopbackPrefix6, workload.EncodedPrefix6)
		}
		for _, entry := range assigned {
			addr, ok := netip.AddrFromSlice(entry.IP)
			addr = addr.Unmap()
			if !ok || entry.LinkIndex == index || entry.LinkIndex == LoIndex || addr.IsLinkLocalUnicast() || addr.Is6() && !ipv6 {
				continue
			}
			inside = append(inside, netip.PrefixFrom(addr, addr.BitLen()))
		}
		for _, prefix := range inside {
			routes = append(routes, localRoute(index, prefix, deviceMetric+index))
		}
	}
	return routes, nil
}

func localRoute(device int, prefix netip.Prefix, metric int) *netlink.Route {
	route := &netlink.Route{
		LinkIndex: device,
		Dst:       IPNet(prefix),
		Table:     unix.RT_TABLE_LOCAL,
		Type:      unix.RTN_LOCAL,
		Scope:     netlink.SCOPE_HOST,
		Protocol:  unix.RTPROT_STATIC,
		Priority:  metric,
	}
	if prefix.Addr().Is6() {
		route.Scope = netlink.SCOPE_UNIVERSE
	}
	return route
}

// DeviceRoutesIn are those that the namespace has, by device and destination.
func DeviceRoutesIn() (map[deviceRoute]*netlink.Route, error) {
	list, err := localRoutes(new(netlink.Handle))
	return deviceRoutesAmong(list), err
}

func deviceRoutesAmong(list []netlink.Route) map[deviceRoute]*netlink.Route {
	found := make(map[deviceRoute]*netlink.Route)
	for _, route := range list {
		if route.Protocol == unix.RTPROT_STATIC && route.Priority == deviceMetric+route.LinkIndex {
			found[keyOf(&route)] = &route
		}
	}
	return found
}

type deviceRoute struct {
	device      int
	destination string
}

func keyOf(route *netlink.Route) deviceRoute {
	return deviceRoute{route.LinkIndex, route.Dst.String()}
}

// setDeviceRoutes makes the routes of all devices what they should be; none where
// they are not wanted. It reports whether it had to change something.
func (ns *Namespace) setDeviceRoutes(wanted, ipv6 bool) (changed bool, err error) {
	all, err := localRoutes(ns.netlink())
	if err != nil {
		return false, err
	}
	missing, surplus, err := ns.diffDeviceRoutes(deviceRoutesAmong(all), wanted, ipv6)
	if err != nil {
		return false, err
	}
	for _, route := range missing {
		if err := ns.netlink().RouteReplace(route); err != nil {
			return true, fmt.Errorf("set route %s by device %d: %w", route.Dst, route.LinkIndex, err)
		}
	}
	for _, route := range surplus {
		if err := deleteRoute(ns.netlink(), route); err != nil {
			return true, err
		}
	}
	return len(missing)+len(surplus) > 0, nil
}

func (ns *Namespace) diffDeviceRoutes(there map[deviceRoute]*netlink.Route, wanted, ipv6 bool) (missing, surplus []*netlink.Route, err error) {
	if wanted {
		routes, err := ns.deviceRoutes(ipv6)
		if err != nil {
			return nil, nil, err
		}
		for _, route := range routes {
			if there[keyOf(route)] == nil {
				missing = append(missing, route)
			}
			delete(there, keyOf(route))
		}
	}
	for _, route := range there {
		surplus = append(surplus, route)
	}
	return missing, surplus, nil
}
