// SPDX-License-Identifier: MPL-2.0

package host

import (
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inside is what several looks at a namespace share whose thread stays in it.
type inside struct{ sockets *netlink.Handle }

// Within hands action the namespace with the calling goroutine's thread inside, for several
// looks by that goroutine: entering it, and a socket for each question, would cost more
// than the answers.
func (ns *Namespace) Within(action func(in *Namespace) error) error {
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
