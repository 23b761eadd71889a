// SPDX-License-Identifier: MPL-2.0

package network

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/cni/network/hostport"
	"github.com/weirmesh/weir/redirect/host/sysctl"
	"golang.org/x/sys/unix"
)

func hasDevice(name string) bool {
	there := false
	_ = withHandle(func(h *netlink.Handle) error {
		link, err := find1(h, name)
		there = link != nil
		return err
	})
	return there
}

// ensure makes the attachment what its result says, and tells what was missing.
func (n *Network) ensure(r *attachment.Record, ns *namespace) (repairs []string, err error) {
	err = n.records.Locked(func() error {
		return withHandle(func(h *netlink.Handle) error {
			steps := []func() ([]string, error){
				func() ([]string, error) { return forwarding(r, h) },
				func() ([]string, error) { return n.ensureBridge(h, r) },
				func() ([]string, error) { return ensureRules(r) },
				func() ([]string, error) { return loopbackRoute(r, h) },
				func() ([]string, error) { return ensurePair(r, h, ns) },
			}
			for _, step := range steps {
				did, err := step()
				repairs = append(repairs, did...)
				if err != nil {
					return err
				}
			}
			return nil
		})
	})
	if err != nil {
		return repairs, err
	}
	did, err := n.configure(r, ns)
	return append(repairs, did...), err
}

// forwarding makes the node a router, where it is to be the gateway.
func forwarding(r *attachment.Record, h *netlink.Handle) (repairs []string, err error) {
	if !r.Gateway {
		return nil, nil
	}
	if r.HasFamily(netlink.FAMILY_V4) {
		changed, err := sysctl.Shared().Set("1", "net", "ipv4", "ip_forward")
		if err != nil {
			return nil, err
		}
		if changed {
			repairs = append(repairs, "ip_forward")
		}
	}
	if r.HasFamily(netlink.FAMILY_V6) {
		changed, err := ensureForwarding6(h)
		if err != nil {
			return repairs, err
		}
		if changed {
			repairs = append(repairs, "forwarding of IPv6")
		}
	}
	return repairs, nil
}

func ensureForwarding6(h *netlink.Handle) (changed bool, err error) {
	on, err := isSysctl("1", "net", "ipv6", "conf", "all", "forwarding")
	if err != nil || on {
		return false, err
	}
	if err := keepRouterAdvertisements(h); err != nil {
		return false, err
	}
	return sysctl.Shared().Set("1", "net", "ipv6", "conf", "all", "forwarding")
}

func (n *Network) ensureBridge(h *netlink.Handle, r *attachment.Record) (repairs []string, err error) {
	link, err := find1(h, r.Bridge)
	if err != nil {
		return nil, err
	}
	if link == nil {
		if err := n.makeBridge(h, r); err != nil {
			return nil, err
		}
		repairs = append(repairs, "bridge "+r.Bridge)
		if link, err = h.LinkByName(r.Bridge); err != nil {
			return repairs, fmt.Errorf("find bridge %s: %w", r.Bridge, err)
		}
	}
	if link.Type() != "bridge" {
		return repairs, fmt.Errorf("bridge %s: a device of type %s has that name: %w", r.Bridge, link.Type(), attachment.ErrTaken)
	}
	if r.Promiscuous && link.Attrs().Promisc == 0 {
		if err := h.SetPromiscOn(link); err != nil {
			return repairs, fmt.Errorf("set bridge %s promiscuous: %w", r.Bridge, err)
		}
	}
	// A workload must not become the node's router by announcing itself.
	if _, err := sysctl.Shared().Set("0", "net", "ipv6", "conf", r.Bridge, "accept_ra"); err != nil {
		return repairs, err
	}
	if !isUp(link) {
		if err := h.LinkSetUp(link); err != nil {
			return repairs, fmt.Errorf("set bridge %s up: %w", r.Bridge, err)
		}
		repairs = append(repairs, r.Bridge+" was down")
	}
	if !r.Gateway {
		return repairs, nil
	}
	did, err := ensureGateways(r, h, link)
	return append(repairs, did...), err
}

func ensureGateways(r *attachment.Record, h *netlink.Handle, bridge netlink.Link) (repairs []string, err error) {
	if r.HasFamily(netlink.FAMILY_V6) {
		if _, err := sysctl.Shared().Set("0", "net", "ipv6", "conf", r.Bridge, "disable_ipv6"); err != nil {
			return nil, err
		}
	}
	var present []netlink.Addr
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		if !r.HasFamily(family) {
			continue // the kernel lists all devices, and each end of an allocation has one of IPv6
		}
		listed, err := h.AddrList(bridge, family)
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", r.Bridge, err)
		}
		present = append(present, listed...)
	}
	for _, ip := range r.Result.IPs {
		want := &net.IPNet{IP: ip.Gateway, Mask: ip.Address.Mask}
		if hasAddress(present, want) {
			continue
		}
		if err := removeOverlapping(r, h, bridge, present, want); err != nil {
			return repairs, err
		}
		if err := addAddress(h, bridge, want); err != nil {
			return repairs, err
		}
		repairs = append(repairs, fmt.Sprintf("gateway %s on %s", want, r.Bridge))
	}
	return repairs, nil
}

// removeOverlapping takes those addresses off the bridge whose subnet is that of the
// gateway, where the configuration says that it may.
func removeOverlapping(r *attachment.Record, h *netlink.Handle, bridge netlink.Link, present []netlink.Addr, gateway *net.IPNet) error {
	for _, other := range present {
		if !other.Contains(gateway.IP) && !gateway.Contains(other.IP) {
			continue
		}
		if !r.ForceAddress {
			return fmt.Errorf("bridge %s has address %s, the gateway is to be %s: set forceAddress to replace it: %w",
				r.Bridge, other.IPNet, gateway, attachment.ErrTaken)
		}
		if err := h.AddrDel(bridge, &other); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s from %s: %w", other.IPNet, r.Bridge, err)
		}
	}
	return nil
}

// ensurePair makes the pair of devices, one end in the namespace, the other a
// port of the bridge.
func ensurePair(r *attachment.Record, h *netlink.Handle, ns *namespace) (repairs []string, err error) {
	bridge, err := h.LinkByName(r.Bridge)
	if err != nil {
		return nil, fmt.Errorf("find bridge %s: %w", r.Bridge, err)
	}
	name := attachment.HostDevice(r.Key)
	host, mac, err := findPair(r, h, ns, name)
	if err != nil {
		return nil, err
	}
	if host == nil {
		if host, mac, err = makePair(r, h, ns, name); err != nil {
			return nil, err
		}
		repairs = append(repairs, "interface "+r.Key.IfName)
	}
	plugged, err := plugIn(r, h, host, bridge)
	repairs = append(repairs, plugged...)
	if err != nil {
		return repairs, err
	}
	r.Result.Interfaces[attachment.AtHost].Mac = host.Attrs().HardwareAddr.String()
	r.Result.Interfaces[attachment.AtBridge].Mac = bridge.Attrs().HardwareAddr.String()
	r.Result.Interfaces[attachment.AtAllocation].Mac = mac.String()
	return repairs, nil
}

// findPair finds the host's end of the pair, nil where there is none, and the hardware
// address of the other. A device of the name that is not of this pair goes.
func findPair(r *attachment.Record, h *netlink.Handle, ns *namespace, name string) (host netlink.Link, mac net.HardwareAddr, err error) {
	if host, err = find1(h, name); err != nil {
		return nil, nil, err
	}
	inside := 0 // index of the device in the namespace
	err = ns.do(func(h *netlink.Handle) error {
		link, err := find1(h, r.Key.IfName)
		if link != nil {
			inside, mac = link.Attrs().Index, link.Attrs().HardwareAddr
		}
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	if host != nil && (inside == 0 || host.Attrs().ParentIndex != inside) {
		if err := h.LinkDel(host); err != nil { // of a namespace that is no longer this key's
			return nil, nil, fmt.Errorf("remove stale device %s: %w", name, err)
		}
		host = nil
	}
	if host == nil && inside != 0 {
		return nil, nil, fmt.Errorf("make %s: the namespace has a device of that name: %w", r.Key.IfName, attachment.ErrTaken)
	}
	return host, mac, nil
}

// plugIn makes the host's end a port of the bridge, with the port's options, and sets it up.
func plugIn(r *attachment.Record, h *netlink.Handle, host, bridge netlink.Link) (repairs []string, err error) {
	name := host.Attrs().Name
	if host.Attrs().MasterIndex != bridge.Attrs().Index {
		if err := h.LinkSetMaster(host, bridge); err != nil {
			return repairs, fmt.Errorf("make %s a port of bridge %s: %w", name, r.Bridge, err)
		}
		repairs = append(repairs, "port "+name+" of bridge "+r.Bridge)
	}
	if r.Hairpin {
		if err := h.LinkSetHairpin(host, true); err != nil {
			return repairs, fmt.Errorf("set hairpin mode on %s: %w", name, err)
		}
	}
	if r.Isolated {
		if err := h.LinkSetIsolated(host, true); err != nil {
			return repairs, fmt.Errorf("isolate port %s: %w", name, err)
		}
	}
	// A port has no use for IPv6 of its own. Its link-local address and routes are only in
	// the way of who lists those of the node: where that cannot be set, nothing is lost.
	if !isUp(host) {
		_, _ = sysctl.Shared().Set("1", "net", "ipv6", "conf", name, "disable_ipv6")
	}
	up, err := setUp(h, host)
	return append(repairs, up...), err
}

func makePair(r *attachment.Record, h *netlink.Handle, ns *namespace, name string) (netlink.Link, net.HardwareAddr, error) {
	mtu := r.MTU
	if mtu == 0 {
		mtu = nodeMTU(h)
	}
	veth := &netlink.Veth{
		LinkAttrs:     netlink.NewLinkAttrs(),
		PeerName:      r.Key.IfName,
		PeerNamespace: netlink.NsFd(int(ns.file.Fd())),
		PeerMTU:       uint32(mtu),
	}
	veth.Name, veth.MTU = name, mtu
	if err := h.LinkAdd(veth); err != nil {
		return nil, nil, fmt.Errorf("make %s and %s: %w", name, r.Key.IfName, err)
	}
	host, err := h.LinkByName(name)
	if err != nil {
		return nil, nil, fmt.Errorf("find %s: %w", name, err)
	}
	var mac net.HardwareAddr
	err = ns.do(func(h *netlink.Handle) error {
		device, err := h.LinkByName(r.Key.IfName)
		if err != nil {
			return fmt.Errorf("find %s: %w", r.Key.IfName, err)
		}
		mac = device.Attrs().HardwareAddr
		return nil
	})
	return host, mac, err
}

// disconnect ends the host ports and removes the devices, with no [Repair] in between: it
// would put the host ports back.
func (n *Network) disconnect(r *attachment.Record) (ports, devices error) {
	ports = hostport.UnmapByPortmap(n.records.Ctx, r)
	locked := n.records.Locked(func() error {
		ports = errors.Join(ports, hostport.Unmap(r, n.records))
		devices = removeDevices(r)
		return nil
	})
	return errors.Join(ports, locked, hostport.ForgetFlows(r)), devices
}

// removeDevices removes the pair, and the rules when the bridge has lost its
// last port.
func removeDevices(r *attachment.Record) error {
	return withHandle(func(h *netlink.Handle) error {
		host, err := find1(h, attachment.HostDevice(r.Key))
		if err != nil {
			return err
		}
		if host != nil {
			if err := h.LinkDel(host); err != nil && !errors.Is(err, unix.ENODEV) {
				return fmt.Errorf("remove device %s: %w", host.Attrs().Name, err)
			}
		}
		if r.Bridge == "" {
			return nil
		}
		ports, err := portsOf(h, r.Bridge)
		if err != nil || ports > 0 {
			return err
		}
		return removeRules(r.Bridge)
	})
}

func portsOf(h *netlink.Handle, bridge string) (count int, err error) {
	link, err := find1(h, bridge)
	if err != nil || link == nil {
		return 0, err
	}
	links, err := h.LinkList()
	if err != nil {
		return 0, fmt.Errorf("list devices: %w", err)
	}
	for _, port := range links {
		if port.Attrs().MasterIndex == link.Attrs().Index {
			count++
		}
	}
	return count, nil
}
