// SPDX-License-Identifier: MPL-2.0

package reconcile

import (
	"errors"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// A listener that is older than the workload's rows was not seen by sockops:
// of an adopted allocation, after lost maps, or on a port that Consul named
// only later. Such listeners are registered from user space, under the same
// identity test, by a copy of the socket's descriptor (pidfd_getfd, Linux 5.6):
// observe, decide, apply.

// ExistingListener is a listener under the proxy's UID on one of a proxy's ports.
type ExistingListener struct {
	host.Socket
	at      workload.ProxyPort
	Roles   []bpfmap.BpfListenerRole // that it can serve
	Missing []bpfmap.BpfListenerRole // ... of which it is not registered for
}

// RegisterExistingListeners registers what is there already, and says what it did.
// processes may be nil.
func RegisterExistingListeners(tables *bpfmap.Tables, paths store.Paths, ns *host.Namespace, w workload.Workload, rejected []uint64, processes *host.Processes) (adopted []program.Repair, err error) {
	listeners, err := observeListeners(tables, ns, w)
	if err != nil {
		return nil, err
	}
	proxies, err := observeProxies(tables, ns.Cookie, w, listeners)
	if err != nil {
		return nil, err
	}
	for _, l := range listeners {
		proxy := proxies[l.at.ProxyID]
		if l.settled(proxy) {
			continue
		}
		fd, cgroup, err := ns.CopySocket(l.Inode, paths.CgroupRoot, processes)
		if errors.Is(err, host.ErrNoOwner) {
			continue // closed in between, or its owner is ending
		}
		if err != nil {
			return adopted, err
		}
		next, admitted := l.Decide(proxy, cgroup, rejected)
		if admitted {
			admitted, err = l.apply(tables, ns.Cookie, fd, next)
		}
		unix.Close(fd)
		if err != nil {
			return adopted, err
		}
		if admitted {
			proxies[l.at.ProxyID] = next
			adopted = append(adopted, program.Repair{Kind: program.ListenerRegistered, Object: netip.AddrPortFrom(l.Addr, l.Port).String()})
		}
	}
	return adopted, nil
}

// observeListeners finds the sockets that may be registered, and for what they are.
func observeListeners(tables *bpfmap.Tables, ns *host.Namespace, w workload.Workload) (found []ExistingListener, err error) {
	sockets, err := ns.Listening()
	if err != nil {
		return nil, err
	}
	for _, socket := range sockets {
		at, roles := inspect.SocketRoles(socket, w)
		if len(roles) == 0 || socket.UID != w.ProxyUID {
			continue
		}
		missing, err := tables.MissingFrom(ns.Cookie, roles, at.Port, socket.Cookie)
		if err != nil {
			return nil, err
		}
		found = append(found, ExistingListener{socket, at, roles, missing})
	}
	return found, nil
}

// observeProxies reads what the kernel knows of the proxies. One of which no listener
// is registered any more is learned anew.
func observeProxies(tables *bpfmap.Tables, cookie uint64, w workload.Workload, listeners []ExistingListener) (map[uint8]bpfmap.BpfProxy, error) {
	proxies := make(map[uint8]bpfmap.BpfProxy)
	for i := range w.All() {
		id := w.ProxyID(i)
		proxy, err := tables.ProxyState(cookie, id)
		registered := slices.ContainsFunc(listeners, func(l ExistingListener) bool {
			return l.at.ProxyID == id && len(l.Missing) < len(l.Roles)
		})
		if err == nil && !registered {
			// None is at these ports; at others it takes a walk to know.
			proxy, err = tables.DeleteRegistered(cookie, id, proxy, w)
		}
		if err != nil {
			return nil, err
		}
		proxies[id] = proxy
	}
	return proxies, nil
}

// settled reports a listener that is registered for all that it can serve. A proxy
// whose row was lost is learned anew from what is registered.
func (l ExistingListener) settled(proxy bpfmap.BpfProxy) bool {
	return len(l.Missing) == 0 && proxy != (bpfmap.BpfProxy{})
}

// Decide reports whether a listener that lives in the cgroup is the proxy's, and what
// is known of the proxy then. It is the test of weir_sockops: the first one shows
// who the proxy is, and a second candidate waits.
func (l ExistingListener) Decide(proxy bpfmap.BpfProxy, cgroup uint64, rejected []uint64) (next bpfmap.BpfProxy, admitted bool) {
	if proxy.Cgroup != 0 && cgroup != 0 && proxy.Cgroup != cgroup || slices.Contains(rejected, cgroup) {
		return proxy, false
	}
	if proxy.Cgroup == 0 {
		proxy.Cgroup = cgroup
		proxy.Flags |= bpfmap.BpfProxyFlagPROXY_PINNED
	}
	for _, role := range l.Roles {
		proxy.Flags |= bpfmap.RoleFlag(role)
	}
	return proxy, true
}

// apply registers the socket and writes what is known of its proxy. As in
// weir_sockops, the kernel takes no MPTCP socket into the table, and a proxy with
// more listeners than slots has enough of them there.
func (l ExistingListener) apply(tables *bpfmap.Tables, cookie uint64, fd int, proxy bpfmap.BpfProxy) (done bool, err error) {
	err = tables.RegisterListener(cookie, l.Missing, l.at.Port, fd)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, ebpf.ErrKeyExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, tables.Put("proxies", bpfmap.ProxyKey(cookie, l.at.ProxyID), proxy, ebpf.UpdateAny)
}
