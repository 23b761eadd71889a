// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Addresses and ports of a site. The ranges are reserved for private use and
// documentation; nothing leaves the site's two namespaces.
const (
	insideAddr   = "10.210.0.2"
	outsideAddr  = "10.210.0.1"
	outboundPort = 15001
	inboundPort  = 20000
	proxyOut     = "127.0.0.1:15001"    // the proxy's outbound listener
	proxyIn      = "10.210.0.2:20000"   // the proxy's inbound listener, from outside
	remote       = "198.51.100.10:8080" // what a task dials
	service      = "10.210.0.2:8080"    // what the outside dials
)

// addrPort parses one of the constants above.
func addrPort(text string) netip.AddrPort { return netip.MustParseAddrPort(text) }

// A site is what one measurement runs in: the namespace of an allocation with
// eth0, joined by veth to a namespace that stands for everything outside.
type site struct {
	name    string
	inside  string // path of the allocation's namespace
	outside string // path of the other one
}

// newSite makes both namespaces and their addresses, in dir.
func newSite(dir, name string) (*site, error) {
	s := &site{name: name, inside: filepath.Join(dir, name), outside: filepath.Join(dir, name+"-outside")}
	if err := s.build(); err != nil {
		return nil, errors.Join(fmt.Errorf("make site %s: %w", name, err), s.close())
	}
	return s, nil
}

// newBareSite makes an allocation's namespace with nothing but lo, which has
// the allocation's address: hundreds of veths would only add noise.
func newBareSite(dir, name string, addr netip.Addr) (*site, error) {
	s := &site{name: name, inside: filepath.Join(dir, name), outside: filepath.Join(dir, name+"-outside")}
	err := newNetNS(s.inside)
	if err == nil {
		err = inNetNS(s.inside, func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return fmt.Errorf("find lo: %w", err)
			}
			address := &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(32, 32)}}
			return errors.Join(netlink.AddrAdd(lo, address), netlink.LinkSetUp(lo))
		})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make site %s: %w", name, err), s.close())
	}
	return s, nil
}

func (s *site) build() error {
	for _, path := range []string{s.inside, s.outside} {
		if err := newNetNS(path); err != nil {
			return err
		}
	}
	other, err := os.Open(s.outside)
	if err != nil {
		return err
	}
	defer other.Close()
	err = inNetNS(s.inside, func() error {
		veth := &netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: "eth0"},
			PeerName:      "eth0",
			PeerNamespace: netlink.NsFd(other.Fd()),
		}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("add veth: %w", err)
		}
		return raise(insideAddr)
	})
	if err != nil {
		return err
	}
	if err := inNetNS(s.outside, func() error { return raise(outsideAddr) }); err != nil {
		return err
	}
	return inNetNS(s.inside, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return fmt.Errorf("find eth0: %w", err)
		}
		route := &netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: net.ParseIP(outsideAddr)}
		if err := netlink.RouteAdd(route); err != nil {
			return fmt.Errorf("add default route: %w", err)
		}
		return nil
	})
}

// raise gives eth0 its address, sets it and lo up, and gives the namespace the
// kernel's default range of local ports, whatever the host uses.
func raise(addr string) error {
	for _, name := range []string{"lo", "eth0"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s: %w", name, err)
		}
		if name == "eth0" {
			ip := &net.IPNet{IP: net.ParseIP(addr), Mask: net.CIDRMask(24, 32)}
			if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: ip}); err != nil {
				return fmt.Errorf("add address to eth0: %w", err)
			}
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("set %s up: %w", name, err)
		}
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("32768 60999"), 0)
}

func (s *site) close() error {
	return errors.Join(removeNetNS(s.inside), removeNetNS(s.outside))
}

// newNetNS makes a network namespace that lives as long as the mount at path.
func newNetNS(path string) error {
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		return err
	}
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare network namespace: %w", err)
		}
		if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", path, err)
		}
		return nil
	})
}

func removeNetNS(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// inNetNS runs f on a thread that is in the namespace at path. A process that
// f starts is born there.
func inNetNS(path string, f func() error) error {
	ns, err := os.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	return onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter %s: %w", path, err)
		}
		return f()
	})
}

// onThread runs f on a thread of its own, whose namespace and CPUs f may
// change. A thread that cannot be brought back is not used again.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		restore, err := rememberThread()
		if err != nil {
			done <- err
			return
		}
		err = f()
		if back := restore(); back != nil {
			done <- errors.Join(err, back)
			return // still locked: the thread ends with its goroutine
		}
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}

func rememberThread() (restore func() error, err error) {
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	var cpus unix.CPUSet
	if err := unix.SchedGetaffinity(0, &cpus); err != nil {
		own.Close()
		return nil, fmt.Errorf("get CPUs of thread: %w", err)
	}
	return func() error {
		defer own.Close()
		return errors.Join(
			unix.Setns(int(own.Fd()), unix.CLONE_NEWNET),
			unix.SchedSetaffinity(0, &cpus),
		)
	}, nil
}
