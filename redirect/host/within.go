// SPDX-License-Identifier: MPL-2.0

package host

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/host/dump"
	"golang.org/x/sys/unix"
)

// inside is what several looks at a namespace share whose thread stays in it.
type inside struct {
	sockets   *netlink.Handle
	addresses []netlink.Addr // of the devices; nil: nobody asked yet
}

// Within opens the namespace at path and hands it to action with the calling goroutine's
// thread inside, for several looks by that goroutine: entering it, and a socket for each
// question, would cost more than the answers. What they see is of one moment.
func Within(path string, action func(in *Namespace) error) (err error) {
	ns, err := openFile(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ns.Close()) }()
	return ns.inOneSocket(func(in *Namespace) error {
		if err := in.learnCookie(); err != nil {
			return err
		}
		return action(in)
	})
}

// inOneSocket is Do for several questions and changes over one netlink socket.
func (ns *Namespace) inOneSocket(action func(in *Namespace) error) error {
	if ns.inside != nil {
		return action(ns)
	}
	return ns.Do(func() error {
		sockets, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink in namespace %s: %w", ns.File.Name(), err)
		}
		defer sockets.Close()
		in := *ns
		in.inside = &inside{sockets: sockets}
		return action(&in)
	})
}

// netlink asks the kernel in the calling thread's namespace, which is this one.
func (ns *Namespace) netlink() *netlink.Handle {
	if ns.inside != nil {
		return ns.inside.sockets
	}
	return new(netlink.Handle) // a socket for each question
}

// assigned are the addresses of the namespace's devices, lo among them. The calling thread
// is inside.
func (ns *Namespace) assigned() ([]netlink.Addr, error) {
	if ns.inside != nil && ns.inside.addresses != nil {
		return ns.inside.addresses, nil
	}
	list, err := dump.List(func() ([]netlink.Addr, error) { return ns.netlink().AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	if ns.inside != nil {
		ns.inside.addresses = list
	}
	return list, nil
}

// learnCookie reads the cookie with the calling thread inside.
func (ns *Namespace) learnCookie() (err error) {
	ns.Cookie, err = ownCookie()
	return err
}
