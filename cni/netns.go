// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"github.com/weirmesh/weir/redirect/host"
	"golang.org/x/sys/unix"
)

// AddressesIn lists the addresses in the network namespace at path, of both
// families. It is redirect.ErrNetNSGone when there is no such namespace.
func AddressesIn(path string) ([]netip.Addr, error) {
	handle, err := netns.GetFromPath(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open namespace %s: %w", path, host.ErrNetNSGone)
	}
	if err != nil {
		return nil, fmt.Errorf("open namespace %s: %w", path, err)
	}
	defer handle.Close()
	socket, err := netlink.NewHandleAt(handle, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("enter namespace %s: %w", path, err)
	}
	defer socket.Close()
	list, err := socket.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	addrs := make([]netip.Addr, 0, len(list))
	for _, entry := range list {
		if addr, ok := netip.AddrFromSlice(entry.IP); ok {
			addrs = append(addrs, addr.Unmap())
		}
	}
	return addrs, nil
}
