// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// A listener that is older than the workload's rows was not seen by sockops:
// of an adopted allocation, after lost maps, or on a port that Consul named
// only later. adopt takes such listeners in from user space, under the same
// identity test, by a copy of the socket's descriptor (pidfd_getfd, Linux 5.6).
func registerExistingListeners(tables *tables, paths Paths, ns *namespace, w Workload, rejected []uint64) (adopted []string, err error) {
	proxies, registered := make(map[uint8]bpfProxy), make(map[uint8]bool)
	for i := range w.all() {
		if proxies[w.proxyID(i)], err = tables.proxyState(ns.cookie, w.proxyID(i)); err != nil {
			return nil, err
		}
	}
	sockets, err := ns.listening()
	if err != nil {
		return nil, err
	}
	type listener struct {
		socket
		at             proxyPort
		roles, missing []bpfListenerRole
	}
	var listeners []listener
	for _, socket := range sockets {
		at, roles := socketRoles(socket, w)
		if len(roles) == 0 || socket.uid != w.ProxyUID {
			continue
		}
		missing, err := tables.missingFrom(ns.cookie, roles, at.port, socket.cookie)
		if err != nil {
			return nil, err
		}
		registered[at.proxyID] = registered[at.proxyID] || len(missing) < len(roles)
		listeners = append(listeners, listener{socket, at, roles, missing})
	}
	for proxyID, proxy := range proxies {
		if registered[proxyID] {
			continue
		}
		// None is at these ports; at others it takes a walk to know.
		if proxies[proxyID], err = tables.deleteRegistered(ns.cookie, proxyID, proxy, w); err != nil {
			return nil, err
		}
	}
	for _, l := range listeners {
		proxy := proxies[l.at.proxyID]
		// A proxy whose row was lost is learned anew from what is registered.
		if len(l.missing) == 0 && proxy != (bpfProxy{}) {
			continue
		}
		fd, cgroup, err := ns.copySocket(l.inode, paths.CgroupRoot)
		if errors.Is(err, errNoOwner) {
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
		err = tables.registerListener(ns.cookie, l.missing, l.at.port, fd)
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
			proxy.Flags |= bpfProxyFlagPROXY_PINNED
		}
		for _, role := range l.roles {
			proxy.Flags |= roleFlag(role)
		}
		if err := tables.put("proxies", proxyKey(ns.cookie, l.at.proxyID), proxy, ebpf.UpdateAny); err != nil {
			return adopted, err
		}
		proxies[l.at.proxyID] = proxy
		adopted = append(adopted, fmt.Sprintf("listener %s registered",
			netip.AddrPortFrom(l.addr, l.port)))
	}
	return adopted, nil
}

// roles is the test that weir_sockops makes on a new listener: which roles of
// the workload's proxies it can serve, and on which port of theirs.
func socketRoles(s socket, w Workload) (port proxyPort, roles []bpfListenerRole) {
	port, ok := w.portOf(s.port)
	if !ok {
		return port, nil
	}
	mapped := s.addr.Is4() || s.addr.Is4In6()
	take4 := mapped || s.addr.IsUnspecified() && !s.v6only
	addr := s.addr.Unmap()
	if port.outbound && !addr.IsUnspecified() && addr != netip.AddrFrom4([4]byte{127, 0, 0, 1}) && addr != netip.IPv6Loopback() {
		return port, nil
	}
	if port.exposed && addr.IsLoopback() {
		return port, nil // kept to the namespace
	}
	four, six := listenerRoles(port)
	if take4 {
		roles = append(roles, four)
	}
	if !mapped {
		roles = append(roles, six)
	}
	return port, roles
}
