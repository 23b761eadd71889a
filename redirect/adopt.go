// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// A listener that is older than the workload's rows was not seen by sockops:
// of an adopted allocation, after lost maps, or on a port that Consul named
// only later. adopt takes such listeners in from user space, under the same
// identity test, by a copy of the socket's descriptor (pidfd_getfd, Linux 5.6).
func registerExistingListeners(tables *bpfmap.Tables, paths store.Paths, ns *host.Namespace, w workload.Workload, rejected []uint64) (adopted []string, err error) {
	proxies, registered := make(map[uint8]bpfmap.BpfProxy), make(map[uint8]bool)
	for i := range w.All() {
		if proxies[w.ProxyID(i)], err = tables.ProxyState(ns.Cookie, w.ProxyID(i)); err != nil {
			return nil, err
		}
	}
	sockets, err := ns.Listening()
	if err != nil {
		return nil, err
	}
	type listener struct {
		host.Socket
		at             workload.ProxyPort
		roles, missing []bpfmap.BpfListenerRole
	}
	var listeners []listener
	for _, socket := range sockets {
		at, roles := socketRoles(socket, w)
		if len(roles) == 0 || socket.UID != w.ProxyUID {
			continue
		}
		missing, err := tables.MissingFrom(ns.Cookie, roles, at.Port, socket.Cookie)
		if err != nil {
			return nil, err
		}
		registered[at.ProxyID] = registered[at.ProxyID] || len(missing) < len(roles)
		listeners = append(listeners, listener{socket, at, roles, missing})
	}
	for proxyID, proxy := range proxies {
		if registered[proxyID] {
			continue
		}
		// None is at these ports; at others it takes a walk to know.
		if proxies[proxyID], err = tables.DeleteRegistered(ns.Cookie, proxyID, proxy, w); err != nil {
			return nil, err
		}
	}
	for _, l := range listeners {
		proxy := proxies[l.at.ProxyID]
		// A proxy whose row was lost is learned anew from what is registered.
		if len(l.missing) == 0 && proxy != (bpfmap.BpfProxy{}) {
			continue
		}
		fd, cgroup, err := ns.CopySocket(l.Inode, paths.CgroupRoot)
		if errors.Is(err, host.ErrNoOwner) {
			continue // closed in between, or its owner is ending
		}
		if err != nil {
			return adopted, err
		}
		if proxy.Cgroup != 0 && cgroup != 0 && proxy.Cgroup != cgroup {
			unix.Close(fd)
			continue // a second candidate
		}
		if slices.Contains(rejected, cgroup) {
			unix.Close(fd)
			continue
		}
		err = tables.RegisterListener(ns.Cookie, l.missing, l.at.Port, fd)
		unix.Close(fd)
		// As in weir_sockops: the kernel takes no MPTCP socket into the table,
		// and a proxy with more listeners than slots has enough of them there.
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, ebpf.ErrKeyExist) {
			continue
		}
		if err != nil {
			return adopted, err
		}
		if proxy.Cgroup == 0 {
			proxy.Cgroup = cgroup
			proxy.Flags |= bpfmap.BpfProxyFlagPROXY_PINNED
		}
		for _, role := range l.roles {
			proxy.Flags |= bpfmap.RoleFlag(role)
		}
		if err := tables.Put("proxies", bpfmap.ProxyKey(ns.Cookie, l.at.ProxyID), proxy, ebpf.UpdateAny); err != nil {
			return adopted, err
		}
		proxies[l.at.ProxyID] = proxy
		adopted = append(adopted, fmt.Sprintf("listener %s registered",
			netip.AddrPortFrom(l.Addr, l.Port)))
	}
	return adopted, nil
}

// roles is the test that weir_sockops makes on a new listener: which roles of
// the workload's proxies it can serve, and on which port of theirs.
func socketRoles(s host.Socket, w workload.Workload) (port workload.ProxyPort, roles []bpfmap.BpfListenerRole) {
	port, ok := w.PortOf(s.Port)
	if !ok {
		return port, nil
	}
	mapped := s.Addr.Is4() || s.Addr.Is4In6()
	take4 := mapped || s.Addr.IsUnspecified() && !s.V6Only
	addr := s.Addr.Unmap()
	if port.Outbound && !addr.IsUnspecified() && addr != netip.AddrFrom4([4]byte{127, 0, 0, 1}) && addr != netip.IPv6Loopback() {
		return port, nil
	}
	if port.Exposed && addr.IsLoopback() {
		return port, nil // kept to the namespace
	}
	four, six := bpfmap.ListenerRoles(port)
	if take4 {
		roles = append(roles, four)
	}
	if !mapped {
		roles = append(roles, six)
	}
	return port, roles
}
