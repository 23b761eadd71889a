// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"runtime"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// namespace is an open network namespace.
type namespace struct {
	file   *os.File
	cookie uint64
	inode  uint64
}

// openNamespace opens the namespace at path and learns its cookie. The host's
// namespace and the caller's own are refused: redirecting them would take the
// node off the network.
func openNamespace(path string) (*namespace, error) {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open namespace %s: %w", path, ErrNetNSGone)
	}
	if err != nil {
		return nil, fmt.Errorf("open namespace: %w", err)
	}
	ns := &namespace{file: file}
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
	ns.inode = stat.Ino
	for _, foreign := range []string{"/proc/self/ns/net", "/proc/1/ns/net"} {
		var other unix.Stat_t
		if err := unix.Stat(foreign, &other); err == nil && other.Dev == stat.Dev && other.Ino == stat.Ino {
			return nil, errors.Join(fmt.Errorf("open namespace %s: %w", path, ErrHostNetNS), file.Close())
		}
	}
	err = ns.do(func() (err error) {
		ns.cookie, err = ownCookie()
		return err
	})
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return ns, nil
}

func (ns *namespace) Close() error { return ns.file.Close() }

// open opens the namespace that the record was made for. ErrNetNSGone says
// that it died, or that its path leads to another one by now.
func (r *record) open() (*namespace, error) {
	ns, err := openNamespace(r.NetNS)
	if err != nil {
		return nil, err
	}
	if ns.cookie != r.Cookie {
		return nil, errors.Join(fmt.Errorf("namespace %s was replaced since ADD: %w", r.NetNS, ErrNetNSGone), ns.Close())
	}
	return ns, nil
}

// do runs action with the calling goroutine's thread inside the namespace. A
// thread that cannot find its way back stays with the goroutine and ends with
// it, so that no other goroutine ever runs in the wrong namespace.
func (ns *namespace) do(action func() error) error {
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
	err = action()
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
		return errors.Join(err, fmt.Errorf("leave namespace %s: %w", ns.file.Name(), back))
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
		if err := Probe(); err != nil { // names all that so old a kernel lacks
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
	ns, err := openNamespace(path)
	if err != nil {
		return 0, err
	}
	defer ns.Close()
	return ns.cookie, nil
}

// Addresses returns what is assigned to the devices of the namespace at path,
// but for lo.
func Addresses(path string) ([]netip.Addr, error) {
	ns, err := openNamespace(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	return ns.addresses()
}

// ephemeral reads the range of ports that the kernel chooses from.
func (ns *namespace) ephemeral() (ports PortRange, err error) {
	err = ns.do(func() error {
		// The file shows the namespace of the thread that reads it.
		text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
		if err != nil {
			return fmt.Errorf("read ephemeral ports: %w", err)
		}
		if _, err := fmt.Sscan(string(text), &ports.First, &ports.Last); err != nil {
			return fmt.Errorf("read ephemeral ports %q: %w", text, err)
		}
		return nil
	})
	return ports, err
}

// addresses returns what is assigned to the namespace's devices, but for lo.
func (ns *namespace) addresses() (found []netip.Addr, err error) {
	err = ns.do(func() error {
		list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
		if err != nil {
			return fmt.Errorf("list addresses: %w", err)
		}
		for _, entry := range list {
			addr, ok := netip.AddrFromSlice(entry.IP)
			if ok && entry.LinkIndex != 1 {
				found = append(found, addr.Unmap())
			}
		}
		slices.SortFunc(found, netip.Addr.Compare)
		return nil
	})
	return found, err
}

// encodedRoutes are the routes that bring the encoded ranges to lo. The
// preferred source makes the kernel choose the workload's own address, so that
// the proxy and the application both see it.
func encodedRoutes(lo netlink.Link, w Workload) (v4, v6 *netlink.Route) {
	route := func(prefix netip.Prefix, source netip.Addr) *netlink.Route {
		addr := prefix.Addr()
		r := &netlink.Route{
			LinkIndex: lo.Attrs().Index,
			Dst:       ipNet(prefix),
			Table:     unix.RT_TABLE_LOCAL,
			Type:      unix.RTN_LOCAL,
			Scope:     netlink.SCOPE_HOST,
			Protocol:  unix.RTPROT_STATIC,
		}
		if addr.Is6() {
			r.Scope = netlink.SCOPE_UNIVERSE
		}
		if source.IsValid() {
			r.Src = source.AsSlice()
		}
		return r
	}
	return route(encodedPrefix4, firstAddr(w, netip.Addr.Is4)), route(encodedPrefix6, firstAddr(w, netip.Addr.Is6))
}

func firstAddr(w Workload, family func(netip.Addr) bool) netip.Addr {
	for _, addr := range w.Addresses {
		if family(addr) && !addr.IsLinkLocalUnicast() {
			return addr
		}
	}
	return netip.Addr{}
}

// setRoutes makes the encoded ranges local to the namespace and reports
// whether IPv6 could be had. lo must be up for that; where nobody did it, it
// is done here.
func (ns *namespace) setRoutes(w Workload) (ipv6 bool, err error) {
	err = ns.do(func() error {
		lo, err := netlink.LinkByIndex(1)
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		if lo.Attrs().Flags&unix.IFF_UP == 0 {
			if err := netlink.LinkSetUp(lo); err != nil {
				return fmt.Errorf("set lo up: %w", err)
			}
		}
		v4, v6 := encodedRoutes(lo, w)
		if err := netlink.RouteReplace(v4); err != nil {
			return fmt.Errorf("set route %s from %s, which must be an address of the namespace: %w",
				encodedPrefix4, firstAddr(w, netip.Addr.Is4), err)
		}
		// A namespace without IPv6, or whose address is not there yet, still
		// takes IPv4; native IPv6 is then refused by name.
		err = netlink.RouteReplace(v6)
		if err != nil && v6.Src != nil {
			v6.Src = nil
			err = netlink.RouteReplace(v6)
		}
		ipv6 = err == nil
		return nil
	})
	return ipv6, err
}

// hasRoutes reports whether both routes of the last setRoutes are there.
func (ns *namespace) hasRoutes(ipv6 bool) (there bool, err error) {
	err = ns.do(func() error {
		for _, prefix := range []netip.Prefix{encodedPrefix4, encodedPrefix6} {
			family := netlink.FAMILY_V4
			if prefix.Addr().Is6() {
				family = netlink.FAMILY_V6
				if !ipv6 {
					continue
				}
			}
			routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_LOCAL, Dst: ipNet(prefix)},
				netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
			if err != nil {
				return fmt.Errorf("list routes: %w", err)
			}
			if len(routes) == 0 {
				return nil
			}
		}
		there = true
		return nil
	})
	return there, err
}

func (ns *namespace) removeRoutes(w Workload) error {
	return ns.do(func() error {
		lo, err := netlink.LinkByIndex(1)
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		v4, v6 := encodedRoutes(lo, w)
		v4.Src, v6.Src = nil, nil
		for _, route := range []*netlink.Route{v4, v6} {
			if err := netlink.RouteDel(route); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENODEV) &&
				!errors.Is(err, unix.EAFNOSUPPORT) {
				return fmt.Errorf("remove route %s: %w", route.Dst, err)
			}
		}
		return nil
	})
}
