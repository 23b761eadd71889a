// SPDX-License-Identifier: MPL-2.0

// Package host reads and changes what the kernel keeps beside BPF: network
// namespaces with their routes, addresses and sockets, processes, cgroups, and the
// rules that consul-cni left.
package host

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/host/dump"
	"github.com/weirmesh/weir/redirect/host/sysctl"
	"github.com/weirmesh/weir/redirect/probe"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

const LoIndex = 1 // lo is the first device of every namespace

// Namespace is an open network namespace.
type Namespace struct {
	File   *os.File
	Cookie uint64
	Inode  uint64

	inside *inside // nil: each look enters it anew
}

// OpenNamespace opens the namespace at path and learns its cookie. The host's
// namespace and the caller's own are refused: redirecting them would take the
// node off the network.
func OpenNamespace(path string) (*Namespace, error) {
	ns, err := openFile(path)
	if err != nil {
		return nil, err
	}
	if err := ns.Do(ns.learnCookie); err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	return ns, nil
}

// openFile is OpenNamespace without the cookie, which only who is inside can learn.
func openFile(path string) (*Namespace, error) {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open namespace %s: %w", path, ErrNetNSGone)
	}
	if err != nil {
		return nil, fmt.Errorf("open namespace: %w", err)
	}
	ns := &Namespace{File: file}
	var fsys unix.Statfs_t
	if err := unix.Fstatfs(int(file.Fd()), &fsys); err != nil || fsys.Type != unix.NSFS_MAGIC {
		// A bind mount that is gone leaves an empty file behind.
		return nil, errors.Join(fmt.Errorf("open namespace %s: not a namespace: %w", path, ErrNetNSGone), file.Close())
	}
	if kind, err := unix.IoctlRetInt(int(file.Fd()), unix.NS_GET_NSTYPE); err != nil || kind != unix.CLONE_NEWNET {
		return nil, errors.Join(fmt.Errorf("open namespace %s: not a network namespace: %w", path, ErrNetNSGone), file.Close())
	}
	var stat unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &stat); err != nil {
		return nil, errors.Join(fmt.Errorf("stat namespace %s: %w", path, err), file.Close())
	}
	ns.Inode = stat.Ino
	// Of the thread: another one of this process may be in a workload's for a moment.
	for _, foreign := range []string{"/proc/thread-self/ns/net", "/proc/1/ns/net"} {
		var other unix.Stat_t
		if err := unix.Stat(foreign, &other); err == nil && other.Dev == stat.Dev && other.Ino == stat.Ino {
			return nil, errors.Join(fmt.Errorf("open namespace %s: %w", path, ErrHostNetNS), file.Close())
		}
	}
	return ns, nil
}

func (ns *Namespace) Close() error { return ns.File.Close() }

// Do runs action with the calling goroutine's thread inside the namespace. A
// thread that cannot find its way back stays with the goroutine and ends with
// it, so that no other goroutine ever runs in the wrong namespace.
func (ns *Namespace) Do(action func() error) error {
	if ns.inside != nil {
		return action()
	}
	runtime.LockOSThread()
	// An os.File would be made known to the poller, which takes five calls more.
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own namespace: %w", err)
	}
	defer unix.Close(home)
	if err := unix.Setns(int(ns.File.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter namespace %s: %w", ns.File.Name(), err)
	}
	err = action()
	if back := unix.Setns(home, unix.CLONE_NEWNET); back != nil {
		return errors.Join(err, fmt.Errorf("leave namespace %s: %w", ns.File.Name(), back))
	}
	runtime.UnlockOSThread()
	return err
}

// ownCookie is the cookie of the calling thread's namespace (SO_NETNS_COOKIE,
// Linux 5.14), which is what bpf_get_netns_cookie returns.
func ownCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if errors.Is(err, unix.ENOPROTOOPT) {
		if err := probe.Probe(); err != nil { // names all that so old a kernel lacks
			return 0, err
		}
	}
	if err != nil {
		return 0, fmt.Errorf("read netns cookie: %w", err)
	}
	return cookie, nil
}

// Cookie returns the cookie of the namespace at path.
func Cookie(path string) (uint64, error) {
	ns, err := OpenNamespace(path)
	if err != nil {
		return 0, err
	}
	defer ns.Close()
	return ns.Cookie, nil
}

// Addresses returns what is assigned to the devices of the namespace at path,
// but for lo.
func Addresses(path string) (found []netip.Addr, err error) {
	err = Within(path, func(in *Namespace) error {
		own, err := in.OwnAddresses()
		for _, addr := range own {
			found = append(found, addr.Addr)
		}
		return err
	})
	return found, err
}

// Ephemeral reads the range of ports that the kernel chooses from.
func (ns *Namespace) Ephemeral(keys *sysctl.Keys) (ports workload.PortRange, err error) {
	err = ns.Do(func() error {
		text, err := keys.Read("net", "ipv4", "ip_local_port_range")
		if err != nil {
			return fmt.Errorf("read ephemeral ports: %w", err)
		}
		if _, err := fmt.Sscan(text, &ports.First, &ports.Last); err != nil {
			return fmt.Errorf("read ephemeral ports %q: %w", text, err)
		}
		return nil
	})
	return ports, err
}

// encodedRoutes are the routes that bring the encoded ranges to lo, those of
// IPv4 first, the whole range before its slices. The preferred source makes the
// kernel choose the workload's own address, so that the proxy and the
// application both see it.
func encodedRoutes(w workload.Workload) (list []*netlink.Route) {
	add := func(prefix netip.Prefix, sources []netip.Addr, slice int) {
		r := &netlink.Route{
			LinkIndex: LoIndex,
			Dst:       IPNet(prefix),
			Table:     unix.RT_TABLE_LOCAL,
			Type:      unix.RTN_LOCAL,
			Scope:     netlink.SCOPE_HOST,
			Protocol:  unix.RTPROT_STATIC,
		}
		if prefix.Addr().Is6() {
			r.Scope = netlink.SCOPE_UNIVERSE
		}
		if slice < len(sources) {
			r.Src = sources[slice].AsSlice()
		}
		list = append(list, r)
	}
	add(workload.EncodedPrefix4, w.Sources.IPv4, 0)
	for slice := 1; slice < len(w.Sources.IPv4); slice++ {
		v4, _ := workload.SlicePrefixes(slice)
		add(v4, w.Sources.IPv4, slice)
	}
	add(workload.EncodedPrefix6, w.Sources.IPv6, 0)
	for slice := 1; slice < len(w.Sources.IPv6); slice++ {
		_, v6 := workload.SlicePrefixes(slice)
		add(v6, w.Sources.IPv6, slice)
	}
	return list
}

func IsIPv6(route *netlink.Route) bool { return route.Dst.IP.To4() == nil }

// SetRoutes makes the encoded ranges local to the namespace and reports
// whether IPv6 could be had. lo must be up for that; where nobody did it, it
// is done here.
func (ns *Namespace) SetRoutes(w workload.Workload) (ipv6 bool, err error) {
	err = ns.inOneSocket(func(in *Namespace) error {
		kernel := in.netlink()
		lo, err := kernel.LinkByIndex(LoIndex)
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		if lo.Attrs().Flags&unix.IFF_UP == 0 {
			if err := kernel.LinkSetUp(lo); err != nil {
				return fmt.Errorf("set lo up: %w", err)
			}
		}
		wanted := encodedRoutes(w)
		if ipv6, err = replaceRoutes(kernel, wanted); err != nil {
			return err
		}
		if w.Sliced {
			if err := deleteOtherRoutes(kernel, wanted); err != nil {
				return err
			}
		}
		_, err = in.setDeviceRoutes(w.Mode == workload.ModeTransparent, ipv6)
		return err
	})
	return ipv6, err
}

// replaceRoutes sets the routes. A namespace without IPv6, or whose address is not there
// yet, still takes IPv4; native IPv6 is then refused by name.
func replaceRoutes(kernel *netlink.Handle, wanted []*netlink.Route) (ipv6 bool, err error) {
	ipv6 = true
	for _, route := range wanted {
		err := kernel.RouteReplace(route)
		if err != nil && !IsIPv6(route) {
			return false, fmt.Errorf("set route %s from %s, which must be an address of the namespace: %w", route.Dst, route.Src, err)
		}
		if err != nil && route.Src != nil {
			route.Src = nil
			err = kernel.RouteReplace(route)
		}
		ipv6 = ipv6 && err == nil
	}
	return ipv6, nil
}

// deleteOtherRoutes deletes those to the encoded ranges that are of a network
// which is gone.
func deleteOtherRoutes(kernel *netlink.Handle, wanted []*netlink.Route) error {
	all, err := localRoutes(kernel)
	if err != nil {
		return err
	}
	for _, route := range encodedAmong(all) {
		if slices.ContainsFunc(wanted, func(r *netlink.Route) bool { return r.Dst.String() == route.Dst.String() }) {
			continue
		}
		if err := deleteRoute(kernel, &route); err != nil {
			return err
		}
	}
	return nil
}

// localRoutes are those of the local table of the calling thread's namespace, of both
// families where it has them.
func localRoutes(kernel *netlink.Handle) (found []netlink.Route, err error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := dump.List(func() ([]netlink.Route, error) {
			return kernel.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_LOCAL}, netlink.RT_FILTER_TABLE)
		})
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		found = append(found, list...)
	}
	return found, nil
}

// PresentRoutes are the routes of the encoded ranges that the calling thread's
// namespace has.
func PresentRoutes() (found []netlink.Route, err error) {
	list, err := localRoutes(new(netlink.Handle))
	return encodedAmong(list), err
}

func encodedAmong(list []netlink.Route) (found []netlink.Route) {
	for _, route := range list {
		if route.Dst == nil || route.Type != unix.RTN_LOCAL || route.LinkIndex != LoIndex {
			continue
		}
		addr, ok := netip.AddrFromSlice(route.Dst.IP)
		bits, _ := route.Dst.Mask.Size()
		addr = addr.Unmap()
		if ok && (workload.EncodedPrefix4.Contains(addr) && bits < addr.BitLen() && bits >= workload.EncodedPrefix4.Bits() ||
			workload.EncodedPrefix6.Contains(addr) && bits >= workload.EncodedPrefix6.Bits()) {
			found = append(found, route)
		}
	}
	return found
}

// HasRoutes reports whether the routes of the last setRoutes are there, with
// the sources that they should have.
func (ns *Namespace) HasRoutes(w workload.Workload, ipv6 bool) (there bool, err error) {
	err = ns.Do(func() error {
		all, err := localRoutes(ns.netlink()) // once for both kinds
		if err != nil {
			return err
		}
		found := encodedAmong(all)
		there = !slices.ContainsFunc(encodedRoutes(w), func(wanted *netlink.Route) bool {
			if IsIPv6(wanted) && !ipv6 {
				return false
			}
			return !slices.ContainsFunc(found, func(r netlink.Route) bool {
				return r.Dst.String() == wanted.Dst.String() && r.Src.Equal(wanted.Src)
			})
		})
		missing, surplus, err := ns.diffDeviceRoutes(deviceRoutesAmong(all), w.Mode == workload.ModeTransparent, ipv6)
		there = there && len(missing)+len(surplus) == 0
		return err
	})
	return there, err
}

func (ns *Namespace) RemoveRoutes() error {
	return ns.inOneSocket(func(in *Namespace) error {
		kernel := in.netlink()
		all, err := localRoutes(kernel)
		if err != nil {
			return err
		}
		for _, route := range encodedAmong(all) {
			if err := deleteRoute(kernel, &route); err != nil {
				return err
			}
		}
		_, err = in.setDeviceRoutes(false, false)
		return err
	})
}

func deleteRoute(kernel *netlink.Handle, route *netlink.Route) error {
	err := kernel.RouteDel(route)
	if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EAFNOSUPPORT) {
		return fmt.Errorf("remove route %s: %w", route.Dst, err)
	}
	return nil
}

func IPNet(prefix netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())}
}

// ErrHostNetNS: the namespace is the host's or the caller's own.
var ErrHostNetNS = errors.New("namespace of the host")

// ErrNetNSGone: the namespace does not exist, or is not the one on record.
var ErrNetNSGone = errors.New("namespace is gone")

// HasEncodedRoute reports whether the encoded IPv4 range is routed to lo.
func (ns *Namespace) HasEncodedRoute() (there bool, err error) {
	err = ns.Do(func() error {
		found, err := PresentRoutes()
		there = slices.ContainsFunc(found, func(r netlink.Route) bool { return !IsIPv6(&r) })
		return err
	})
	return there, err
}
