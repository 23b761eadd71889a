// SPDX-License-Identifier: MPL-2.0

package network

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/host/sysctl"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// namespace is an allocation's open network namespace.
type namespace struct {
	file   *os.File
	cookie uint64
}

// openNamespace opens a namespace. The host's and the caller's own are refused.
func openNamespace(path string) (*namespace, error) {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open namespace %s: %w", path, host.ErrNetNSGone)
	}
	if err != nil {
		return nil, fmt.Errorf("open namespace: %w", err)
	}
	// By descriptor: the path may lead elsewhere by now.
	cookie, err := host.Cookie(fmt.Sprintf("/proc/self/fd/%d", file.Fd()))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("namespace %s: %w", path, err), file.Close())
	}
	return &namespace{file: file, cookie: cookie}, nil
}

func (ns *namespace) Close() error { return ns.file.Close() }

// do runs action with the calling goroutine's thread inside the namespace and
// a netlink socket of it. A thread that cannot find its way back stays with the
// goroutine and ends with it.
func (ns *namespace) do(action func(*netlink.Handle) error) error {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own namespace: %w", err)
	}
	defer home.Close()
	if err := unix.Setns(int(ns.file.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter namespace %s: %w", ns.file.Name(), err)
	}
	err = withHandle(action)
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
		return errors.Join(err, fmt.Errorf("leave namespace %s: %w", ns.file.Name(), back))
	}
	runtime.UnlockOSThread()
	return err
}

// withHandle gives action one netlink socket of the thread's namespace.
func withHandle(action func(*netlink.Handle) error) error {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer handle.Close()
	return action(handle)
}

// has reports whether a device of that name is in the namespace.
func (ns *namespace) has(device string) (there bool, err error) {
	err = ns.do(func(h *netlink.Handle) error {
		link, err := find1(h, device)
		there = link != nil
		return err
	})
	return there, err
}

// refuseInUse is an error where the key's device leads to another namespace
// than this one, in which processes run. The kernel numbers the namespaces at the
// other end of a device.
func (ns *namespace) refuseInUse(key workload.AttachmentID) error {
	return withHandle(func(h *netlink.Handle) error {
		device, err := find1(h, attachment.HostDevice(key))
		if err != nil || device == nil || device.Attrs().NetNsID < 0 {
			return err
		}
		if own, err := h.GetNetNsIdByFd(int(ns.file.Fd())); err != nil {
			return fmt.Errorf("number namespace %s: %w", ns.file.Name(), err)
		} else if own == device.Attrs().NetNsID {
			return nil
		}
		entries, err := os.ReadDir("/proc")
		if err != nil {
			return fmt.Errorf("list processes: %w", err)
		}
		for _, entry := range entries {
			pid, err := strconv.Atoi(entry.Name())
			if err != nil {
				continue
			}
			// One that ended meanwhile has no namespace.
			if id, err := h.GetNetNsIdByPid(pid); err == nil && id == device.Attrs().NetNsID {
				return fmt.Errorf("process %d %w", pid, attachment.ErrInUse)
			}
		}
		return nil
	})
}

// find1 returns nil where there is no such device.
func find1(h *netlink.Handle, name string) (netlink.Link, error) {
	link, err := h.LinkByName(name)
	var none netlink.LinkNotFoundError
	if errors.As(err, &none) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find device %s: %w", name, err)
	}
	return link, nil
}

// configure brings lo and the interface into the state that the result
// describes, inside the namespace.
func (n *Network) configure(r *attachment.Record, ns *namespace) (repairs []string, err error) {
	keys := sysctl.Among(n.records.Dir())
	defer func() { err = errors.Join(err, keys.Close()) }()
	err = ns.do(func(h *netlink.Handle) error {
		lo, err := h.LinkByIndex(1)
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		device, err := h.LinkByName(r.Key.IfName)
		if err != nil {
			return fmt.Errorf("find %s: %w", r.Key.IfName, err)
		}
		if err := setIPv6(r, isUp(device), keys); err != nil {
			return err
		}
		for _, link := range []netlink.Link{lo, device} {
			did, err := setUp(h, link)
			repairs = append(repairs, did...)
			if err != nil {
				return err
			}
		}
		if now := device.Attrs().MTU; r.MTU != 0 && now != r.MTU {
			if err := h.LinkSetMTU(device, r.MTU); err != nil {
				return fmt.Errorf("set mtu %d on %s: %w", r.MTU, r.Key.IfName, err)
			}
			repairs = append(repairs, fmt.Sprintf("mtu of %s was %d", r.Key.IfName, now))
		}
		addrs, err := setAddresses(r, h, device)
		if err != nil {
			return err
		}
		routes, err := setRoutes(r, h, device)
		repairs = append(append(repairs, addrs...), routes...)
		return err
	})
	return repairs, err
}

func isUp(link netlink.Link) bool { return link.Attrs().Flags&net.FlagUp != 0 }

func setUp(h *netlink.Handle, link netlink.Link) (repairs []string, err error) {
	if isUp(link) {
		return nil, nil
	}
	if err := h.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("set %s up: %w", link.Attrs().Name, err)
	}
	return []string{link.Attrs().Name + " was down"}, nil
}

// setIPv6 sets what the interface does with IPv6. With hairpin on, it hears its own
// duplicate address detection; and nobody on the bridge may announce a router. Without IPv6
// in the network it gets no link-local address either, unless it has one. What announces
// that goes to each port of the bridge, which made an ADD among a thousand take three times
// as long.
func setIPv6(r *attachment.Record, up bool, sysctls *sysctl.Keys) error {
	settings := [][2]string{{"accept_dad", "0"}, {"accept_ra", "0"}} // before addresses come
	if r.HasFamily(netlink.FAMILY_V6) {
		settings = append(settings, [2]string{"disable_ipv6", "0"})
	} else if !up {
		settings = append(settings, [2]string{"addr_gen_mode", "1"})
	}
	for _, setting := range settings {
		if _, err := sysctls.Set(setting[1], "net", "ipv6", "conf", r.Key.IfName, setting[0]); err != nil {
			return err
		}
	}
	return nil
}

func setAddresses(r *attachment.Record, h *netlink.Handle, device netlink.Link) (repairs []string, err error) {
	present, err := h.AddrList(device, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses of %s: %w", r.Key.IfName, err)
	}
	for _, ip := range r.Result.IPs {
		if hasAddress(present, &ip.Address) {
			continue
		}
		if err := addAddress(h, device, &ip.Address); err != nil {
			return repairs, err
		}
		repairs = append(repairs, "address "+ip.Address.String())
	}
	return repairs, nil
}

func hasAddress(present []netlink.Addr, want *net.IPNet) bool {
	for _, addr := range present {
		if addr.IPNet.String() == want.String() {
			return true
		}
	}
	return false
}

// addAddress adds an address that may be used at once.
func addAddress(h *netlink.Handle, device netlink.Link, ip *net.IPNet) error {
	addr := &netlink.Addr{IPNet: ip}
	if ip.IP.To4() == nil {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := h.AddrAdd(device, addr); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add address %s to %s: %w", ip, device.Attrs().Name, err)
	}
	return nil
}

// setRoutes adds what is missing of the result's routes, and puts one back that
// leads elsewhere.
func setRoutes(r *attachment.Record, h *netlink.Handle, device netlink.Link) (repairs []string, err error) {
	for _, want := range r.Result.Routes {
		route := routeOf(r, want, device)
		there, err := putRoute(h, route)
		if err != nil {
			return repairs, err
		}
		if !there {
			repairs = append(repairs, "route "+want.Dst.String()+" by "+route.Gw.String())
		}
	}
	return repairs, nil
}

// routeOf is one of the result's routes as the kernel has it. A gateway that is in none of
// the interface's subnets is reached on the link, as point-to-point networks have it.
func routeOf(r *attachment.Record, want *types.Route, device netlink.Link) *netlink.Route {
	gateway := want.GW
	if gateway == nil {
		gateway = r.GatewayIn(want.Dst.IP.To4() != nil)
	}
	route := &netlink.Route{LinkIndex: device.Attrs().Index, Dst: &want.Dst, Gw: gateway, MTU: want.MTU, AdvMSS: want.AdvMSS, Priority: want.Priority}
	if want.Table != nil {
		route.Table = *want.Table
	}
	if want.Scope != nil {
		route.Scope = netlink.Scope(*want.Scope)
	}
	if gateway != nil && !onLink(r, gateway) {
		route.Flags = int(netlink.FLAG_ONLINK)
	}
	return route
}

// putRoute adds a route, in the place of one that leads elsewhere, and reports whether it
// was there already.
func putRoute(h *netlink.Handle, route *netlink.Route) (there bool, err error) {
	err = h.RouteAdd(route)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return false, fmt.Errorf("add route %s by %s: %w", route.Dst, route.Gw, err)
	}
	if err == nil {
		return false, nil
	}
	if there, err = hasRoute(h, route); err != nil || there {
		return there, err
	}
	if err := h.RouteReplace(route); err != nil {
		return false, fmt.Errorf("replace route %s: %w", route.Dst, err)
	}
	return false, nil
}

func onLink(r *attachment.Record, ip net.IP) bool {
	for _, own := range r.Result.IPs {
		if own.Address.Contains(ip) {
			return true
		}
	}
	return false
}

// hasRoute reports a route to the same destination that leads the same way.
func hasRoute(h *netlink.Handle, want *netlink.Route) (bool, error) {
	filter, mask := &netlink.Route{Dst: want.Dst, Table: want.Table}, netlink.RT_FILTER_DST
	if want.Table != 0 {
		mask |= netlink.RT_FILTER_TABLE
	}
	family := netlink.FAMILY_V6
	if want.Dst.IP.To4() != nil {
		family = netlink.FAMILY_V4
	}
	routes, err := h.RouteListFiltered(family, filter, mask)
	if err != nil {
		return false, fmt.Errorf("list routes: %w", err)
	}
	return slices.ContainsFunc(routes, func(route netlink.Route) bool {
		return route.LinkIndex == want.LinkIndex && route.Gw.Equal(want.Gw)
	}), nil
}

// nodeMTU is that of the device with the node's default route, so that nothing
// is sent that has to be cut: the least where there are several, 0 where there
// is none.
func nodeMTU(h *netlink.Handle) (least int) {
	for family, everywhere := range map[int]net.IPNet{
		netlink.FAMILY_V4: {IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
		netlink.FAMILY_V6: {IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)},
	} {
		routes, err := h.RouteListFiltered(family, &netlink.Route{Dst: &everywhere}, netlink.RT_FILTER_DST)
		if err != nil {
			continue
		}
		for _, route := range routes {
			link, err := h.LinkByIndex(route.LinkIndex)
			if err == nil && (least == 0 || link.Attrs().MTU < least) {
				least = link.Attrs().MTU
			}
		}
	}
	return least
}

// keepRouterAdvertisements lets a node that forwards IPv6 from now on still
// hear the routers that it has its routes from: with accept_ra 1 the kernel
// ends that, and the node's own default route with it. Other devices stay deaf.
func keepRouterAdvertisements(h *netlink.Handle) error {
	routes, err := h.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Protocol: unix.RTPROT_RA}, netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return fmt.Errorf("list routes of IPv6: %w", err)
	}
	for _, route := range routes {
		link, err := h.LinkByIndex(route.LinkIndex)
		if err != nil {
			continue // the device went away, and its routes with it
		}
		heard, err := isSysctl("1", "net", "ipv6", "conf", link.Attrs().Name, "accept_ra")
		if err != nil {
			return err
		}
		if heard {
			if _, err := sysctl.Shared().Set("2", "net", "ipv6", "conf", link.Attrs().Name, "accept_ra"); err != nil {
				return err
			}
		}
	}
	return nil
}

func isSysctl(value string, key ...string) (bool, error) {
	now, err := sysctl.Shared().Read(key...)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil // nothing to set
	}
	return now == value, err
}
