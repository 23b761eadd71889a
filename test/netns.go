// SPDX-License-Identifier: MPL-2.0

package test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// NetNS is a network namespace that a test made.
type NetNS struct {
	// Path names the namespace in the filesystem; it is good for CNI_NETNS.
	Path string

	tb     testing.TB
	handle netns.NsHandle
	ended  bool
}

// NewNetNS makes a network namespace with lo up.
func NewNetNS(tb testing.TB) *NetNS {
	tb.Helper()
	ns := NewBareNetNS(tb)
	ns.netlink(tb, func(handle *netlink.Handle) error {
		lo, err := handle.LinkByName("lo")
		if err != nil {
			return err
		}
		return handle.LinkSetUp(lo)
	})
	return ns
}

// NewBareNetNS makes a network namespace in which nothing is set up, not even lo:
// what a runtime hands to a CNI plugin.
func NewBareNetNS(tb testing.TB) *NetNS {
	tb.Helper()
	dir, err := os.MkdirTemp("", "weir-netns-")
	if err != nil {
		tb.Fatalf("make directory for netns: %v", err)
	}
	path := filepath.Join(dir, "netns")
	tb.Cleanup(func() {
		for _, name := range []string{path, dir} {
			if err := os.Remove(name); err != nil && !os.IsNotExist(err) {
				tb.Errorf("remove netns: %v", err)
			}
		}
	})
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		tb.Fatalf("make netns: %v", err)
	}
	done := make(chan error, 1)
	go onThrownAwayThread(func() { done <- bindNewNetNS(path) })
	if err = <-done; err != nil {
		tb.Fatalf("make netns: %v", err)
	}
	ns := &NetNS{Path: path, tb: tb, handle: netns.None()}
	tb.Cleanup(ns.End)
	if ns.handle, err = netns.GetFromPath(path); err != nil {
		tb.Fatalf("open netns: %v", err)
	}
	return ns
}

// End gives the namespace up before the test ends: it dies as soon as nothing
// runs in it.
func (ns *NetNS) End() {
	ns.tb.Helper()
	if ns.ended {
		return
	}
	ns.ended = true
	if err := unix.Unmount(ns.Path, unix.MNT_DETACH); err != nil {
		ns.tb.Errorf("unmount netns: %v", err)
	}
	if err := os.Remove(ns.Path); err != nil && !os.IsNotExist(err) {
		ns.tb.Errorf("remove netns: %v", err)
	}
	if ns.handle.IsOpen() {
		if err := ns.handle.Close(); err != nil {
			ns.tb.Errorf("close netns: %v", err)
		}
	}
}

// Do runs f on the caller's goroutine with its thread inside the namespace.
// Sockets and processes that f itself starts belong to the namespace; goroutines
// that f starts run outside of it.
func (ns *NetNS) Do(f func()) {
	ns.tb.Helper()
	runtime.LockOSThread()
	outside, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		ns.tb.Fatalf("open netns of thread: %v", err)
	}
	defer func() {
		// A thread that cannot go back stays locked: it ends with its goroutine.
		if err := netns.Set(outside); err != nil {
			ns.tb.Errorf("leave netns: %v", err)
		} else {
			runtime.UnlockOSThread()
		}
		outside.Close()
	}()
	if err := netns.Set(ns.handle); err != nil {
		ns.tb.Fatalf("enter netns: %v", err)
	}
	f()
}

// Cookie returns the namespace's cookie, which the kernel never gives twice.
func (ns *NetNS) Cookie() uint64 {
	ns.tb.Helper()
	var cookie uint64
	ns.Do(func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			ns.tb.Fatalf("make socket: %v", err)
		}
		defer unix.Close(fd)
		if cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err != nil {
			ns.tb.Fatalf("read netns cookie: %v", err)
		}
	})
	return cookie
}

// VethEnd is one end of a pair of virtual Ethernet devices.
type VethEnd struct {
	NetNS *NetNS
	// Name is the device's name; eth0 where it is empty.
	Name  string
	Addrs []netip.Prefix
	// DefaultRoute sends what has no other route to the other end's first address
	// of each family.
	DefaultRoute bool
}

// Veth joins two namespaces by a pair of devices that are up and have their
// addresses, IPv6 ones without duplicate address detection.
func Veth(tb testing.TB, a, b VethEnd) {
	tb.Helper()
	a, b = a.withName(), b.withName()
	a.NetNS.netlink(tb, func(handle *netlink.Handle) error {
		return handle.LinkAdd(&netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: a.Name},
			PeerName:      b.Name,
			PeerNamespace: netlink.NsFd(b.NetNS.handle),
		})
	})
	a.configure(tb)
	b.configure(tb)
	a.route(tb, b)
	b.route(tb, a)
}

func (e VethEnd) withName() VethEnd {
	if e.Name == "" {
		e.Name = "eth0"
	}
	return e
}

func (e VethEnd) configure(tb testing.TB) {
	tb.Helper()
	e.NetNS.netlink(tb, func(handle *netlink.Handle) error {
		link, err := handle.LinkByName(e.Name)
		if err != nil {
			return fmt.Errorf("find %s: %w", e.Name, err)
		}
		for _, prefix := range e.Addrs {
			addr, err := netlink.ParseAddr(prefix.String())
			if err != nil {
				return err
			}
			if prefix.Addr().Is6() {
				addr.Flags = unix.IFA_F_NODAD
			}
			if err := handle.AddrAdd(link, addr); err != nil {
				return fmt.Errorf("add %s to %s: %w", prefix, e.Name, err)
			}
		}
		return handle.LinkSetUp(link)
	})
}

func (e VethEnd) route(tb testing.TB, other VethEnd) {
	tb.Helper()
	if !e.DefaultRoute {
		return
	}
	e.NetNS.netlink(tb, func(handle *netlink.Handle) error {
		link, err := handle.LinkByName(e.Name)
		if err != nil {
			return fmt.Errorf("find %s: %w", e.Name, err)
		}
		routed := map[bool]bool{}
		for _, prefix := range other.Addrs {
			if addr := prefix.Addr(); !routed[addr.Is4()] {
				routed[addr.Is4()] = true
				route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: addr.AsSlice()}
				if err := handle.RouteAdd(route); err != nil {
					return fmt.Errorf("route to %s: %w", addr, err)
				}
			}
		}
		return nil
	})
}

// netlink gives f a handle whose sockets are inside the namespace.
func (ns *NetNS) netlink(tb testing.TB, f func(*netlink.Handle) error) {
	tb.Helper()
	handle, err := netlink.NewHandleAt(ns.handle)
	if err != nil {
		tb.Fatalf("open netlink: %v", err)
	}
	defer handle.Close()
	if err := f(handle); err != nil {
		tb.Fatalf("configure netns: %v", err)
	}
}

func bindNewNetNS(path string) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	own := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
	if err := unix.Mount(own, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s: %w", path, err)
	}
	return nil
}

// onThrownAwayThread runs f on a thread that ends with it. The process's first
// thread is never that one: it cannot end, and /proc/self speaks of it.
func onThrownAwayThread(f func()) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		f()
		return // still locked: the thread ends with the goroutine
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		onThrownAwayThread(f)
	}()
	<-done
	runtime.UnlockOSThread()
}
