// SPDX-License-Identifier: MPL-2.0

package attachment

import (
	"fmt"
	"net"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/vishvananda/netlink"
)

// The places of the interfaces in a result.
const (
	AtBridge = iota
	AtHost
	AtAllocation
)

// ResultOf is what the attachment is to look like, from what the IPAM plugin gave.
func (r *Record) ResultOf(leased *current.Result) (*current.Result, error) {
	result := &current.Result{
		CNIVersion: current.ImplementedSpecVersion,
		Interfaces: []*current.Interface{
			AtBridge:     {Name: r.Bridge},
			AtHost:       {Name: HostDevice(r.Key)},
			AtAllocation: {Name: r.Key.IfName, Sandbox: r.NetNS},
		},
		Routes: slices.Clone(leased.Routes),
		DNS:    leased.DNS,
	}
	if !r.DNS.IsEmpty() {
		result.DNS = r.DNS
	}
	for _, ip := range leased.IPs {
		own := *ip
		own.Interface = current.Int(AtAllocation)
		if own.Gateway == nil && r.Gateway {
			own.Gateway = firstAddress(&own.Address)
		}
		if own.Gateway == nil && r.Gateway {
			return nil, fmt.Errorf("address %s: no gateway: its subnet has no room for one", own.Address.String())
		}
		if least := 1280; own.Address.IP.To4() == nil && r.MTU != 0 && r.MTU < least {
			return nil, fmt.Errorf("address %s, mtu %d: IPv6 needs %d: set mtu to that or more, or take the range out of ipam", own.Address.String(), r.MTU, least)
		}
		result.IPs = append(result.IPs, &own)
	}
	for _, ip := range result.IPs {
		everywhere := net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
		if ip.Address.IP.To4() == nil {
			everywhere = net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
		}
		sameFamily := func(route *types.Route) bool {
			return (route.Dst.IP.To4() != nil) == (ip.Address.IP.To4() != nil)
		}
		sameDefault := func(route *types.Route) bool { return sameFamily(route) && isEverywhere(&route.Dst) }
		wanted := !slices.ContainsFunc(leased.Routes, sameFamily)
		if r.DefaultRoute != nil {
			wanted = *r.DefaultRoute
		}
		if wanted && ip.Gateway != nil && !slices.ContainsFunc(result.Routes, sameDefault) {
			result.Routes = append(result.Routes, &types.Route{Dst: everywhere, GW: ip.Gateway})
		}
	}
	return result, nil
}

func isEverywhere(n *net.IPNet) bool {
	ones, bits := n.Mask.Size()
	return bits > 0 && ones == 0
}

// firstAddress is the first address that a subnet gives to hosts; nil where it
// is too small for a gateway of its own.
func firstAddress(n *net.IPNet) net.IP {
	ones, bits := n.Mask.Size()
	if bits-ones < 2 {
		return nil
	}
	first := slices.Clone(n.IP.Mask(n.Mask))
	first[len(first)-1] |= 1
	return first
}

func (r *Record) GatewayIn(v4 bool) net.IP {
	for _, ip := range r.Result.IPs {
		if (ip.Address.IP.To4() != nil) == v4 {
			return ip.Gateway
		}
	}
	return nil
}

func (r *Record) HasFamily(family int) bool {
	return slices.ContainsFunc(r.Result.IPs, func(ip *current.IPConfig) bool {
		return (ip.Address.IP.To4() != nil) == (family == netlink.FAMILY_V4)
	})
}

// Subnets are those of the result's addresses, each once.
func (r *Record) Subnets() (list []*net.IPNet) {
	for _, ip := range r.Result.IPs {
		subnet := &net.IPNet{IP: ip.Address.IP.Mask(ip.Address.Mask), Mask: ip.Address.Mask}
		if !slices.ContainsFunc(list, func(other *net.IPNet) bool { return other.String() == subnet.String() }) {
			list = append(list, subnet)
		}
	}
	return list
}

func AtLeast(have, want string) bool {
	ok, err := version.GreaterThanOrEqualTo(have, want)
	return err == nil && ok
}
