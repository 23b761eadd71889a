// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// SetProxyCgroup says in which cgroup a proxy of the workload is before it listens, so
// that its UID alone lets no other task out meanwhile. It keeps nobody from
// listening: whoever is first under the proxy's UID is taken for it, as without
// SetProxyCgroup, and a proxy that listens stays who it is. service is whose sidecar the
// proxy is; a workload with one proxy needs none.
func (d *Datapath) SetProxyCgroup(key AttachmentID, service string, cgroup uint64) error {
	err := d.onRecord(key, func(tables *tables, r *record, ns *namespace) error {
		w, i := r.desired(), 0
		if len(w.Proxies) > 0 {
			i = slices.IndexFunc(w.all(), func(p Sidecar) bool { return p.Service == service })
		}
		if i < 0 {
			return nil
		}
		if !r.Complete { // its proxy IDs are those in force only once that is finished
			if _, err := d.ensure(tables, r, ns); err != nil {
				return err
			}
		}
		return tables.setProxyCgroup(d.paths, ns, w, w.proxyID(i), cgroup)
	})
	if err != nil {
		return fmt.Errorf("trust cgroup %d of workload %s: %w", cgroup, key, err)
	}
	return nil
}

func (t *tables) setProxyCgroup(paths Paths, ns *namespace, w Workload, proxyID uint8, cgroup uint64) error {
	proxy, err := t.proxyState(ns.cookie, proxyID)
	vouched := proxy.Cgroup == cgroup && proxy.Flags&bpfProxyFlagPROXY_TAKEN == 0
	if err != nil || vouched || proxy.Listeners > 0 {
		return err
	}
	registered, err := t.listenersOf(ns.cookie, proxyID, w)
	if err != nil || len(registered) > 0 {
		return err
	}
	proxy.Cgroup, proxy.Flags = cgroup, proxy.Flags&^(bpfProxyFlagPROXY_SHARED|bpfProxyFlagPROXY_PINNED|bpfProxyFlagPROXY_TAKEN)
	for range 8 {
		if err := t.put("proxies", proxyKey(ns.cookie, proxyID), proxy, ebpf.UpdateAny); err != nil {
			return err
		}
		// A listener that opens meanwhile is counted in the row that was replaced:
		// once none can be under way any more, those that are missing are told.
		waitForReaders()
		if proxy, err = t.proxyState(ns.cookie, proxyID); err != nil {
			return err
		}
		registered, err := t.listenersOf(ns.cookie, proxyID, w)
		if err != nil || len(registered) <= int(proxy.Listeners) {
			return err
		}
		if proxy.Listeners == 0 {
			if proxy.Cgroup, err = ns.cgroupOf(registered, paths); err != nil {
				return err
			}
		}
		proxy.Listeners = uint32(len(registered))
		for _, flags := range registered {
			proxy.Flags |= flags
		}
	}
	return errors.New("its listeners come and go")
}

// listenersOf are the cookies of a proxy's registered listeners, with what each
// says of the families that it takes.
func (t *tables) listenersOf(cookie uint64, proxyID uint8, w Workload) (map[uint64]bpfProxyFlag, error) {
	found := make(map[uint64]bpfProxyFlag)
	for _, port := range w.ports() {
		if port.proxyID != proxyID {
			continue
		}
		four, six := port.roles()
		for _, role := range []bpfListenerRole{four, six} {
			slots, err := t.registered(cookie, role, port.port)
			if err != nil {
				return nil, err
			}
			for _, socket := range slots {
				found[socket] |= roleFlag(role)
			}
		}
	}
	return found, nil
}

// cgroupOf is that of a process that holds one of the listeners, by cookie; 0 if
// all have closed.
func (ns *namespace) cgroupOf(listeners map[uint64]bpfProxyFlag, paths Paths) (uint64, error) {
	sockets, err := ns.listening()
	if err != nil {
		return 0, err
	}
	for _, socket := range sockets {
		if _, wanted := listeners[socket.cookie]; !wanted {
			continue
		}
		fd, cgroup, err := ns.copySocket(socket.inode, paths)
		if errors.Is(err, errNoOwner) {
			continue
		}
		if err == nil {
			unix.Close(fd)
		}
		return cgroup, err
	}
	return 0, nil
}
