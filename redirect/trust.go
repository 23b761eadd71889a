// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// SetProxyCgroup says in which cgroup a proxy of the workload is before it listens, so
// that its UID alone lets no other task out meanwhile. It keeps nobody from
// listening: whoever is first under the proxy's UID is taken for it, as without
// SetProxyCgroup, and a proxy that listens stays who it is. service is whose sidecar the
// proxy is; a workload with one proxy needs none.
func (d *Datapath) SetProxyCgroup(key workload.AttachmentID, service string, cgroup uint64) error {
	err := d.onRecord(key, func(tables *bpfmap.Tables, r *store.Record, ns *host.Namespace) error {
		w, i := r.Desired(), 0
		if len(w.Proxies) > 0 {
			i = slices.IndexFunc(w.All(), func(p workload.Sidecar) bool { return p.Service == service })
		}
		if i < 0 {
			return nil
		}
		if r.State != store.Complete { // its proxy IDs are those in force only once that is finished
			if _, err := d.Ensure(tables, r, ns); err != nil {
				return err
			}
		}
		return trustProxy(tables, d.Paths(), ns, w, w.ProxyID(i), cgroup)
	})
	if err != nil {
		return fmt.Errorf("trust cgroup %d of workload %s: %w", cgroup, key, err)
	}
	return nil
}

func trustProxy(t *bpfmap.Tables, paths store.Paths, ns *host.Namespace, w workload.Workload, proxyID uint8, cgroup uint64) error {
	proxy, err := t.ProxyState(ns.Cookie, proxyID)
	vouched := proxy.Cgroup == cgroup && proxy.Flags&bpfmap.BpfProxyFlagPROXY_TAKEN == 0
	if err != nil || vouched || proxy.Listeners > 0 {
		return err
	}
	registered, err := t.ListenersOf(ns.Cookie, proxyID, w)
	if err != nil || len(registered) > 0 {
		return err
	}
	proxy.Cgroup, proxy.Flags = cgroup, proxy.Flags&^(bpfmap.BpfProxyFlagPROXY_SHARED|bpfmap.BpfProxyFlagPROXY_PINNED|bpfmap.BpfProxyFlagPROXY_TAKEN)
	for range 8 {
		proxy.Outbound = 0 // too few makes the kernel look in the table
		if err := t.Put("proxies", bpfmap.ProxyKey(ns.Cookie, proxyID), proxy, ebpf.UpdateAny); err != nil {
			return err
		}
		// A listener that opens meanwhile is counted in the row that was replaced:
		// once none can be under way any more, those that are missing are told.
		bpfmap.WaitForReaders()
		if proxy, err = t.ProxyState(ns.Cookie, proxyID); err != nil {
			return err
		}
		registered, err := t.ListenersOf(ns.Cookie, proxyID, w)
		if err != nil || len(registered) <= int(proxy.Listeners) {
			return err
		}
		if proxy.Listeners == 0 {
			if proxy.Cgroup, err = cgroupOf(ns, registered, paths); err != nil {
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

// cgroupOf is that of a process that holds one of the listeners, by cookie; 0 if
// all have closed.
func cgroupOf(ns *host.Namespace, listeners map[uint64]bpfmap.BpfProxyFlag, paths store.Paths) (uint64, error) {
	sockets, err := ns.Listening()
	if err != nil {
		return 0, err
	}
	for _, socket := range sockets {
		if _, wanted := listeners[socket.Cookie]; !wanted {
			continue
		}
		fd, cgroup, err := ns.CopySocket(socket.Inode, paths.CgroupRoot, nil)
		if errors.Is(err, host.ErrNoOwner) {
			continue
		}
		if err == nil {
			unix.Close(fd)
		}
		return cgroup, err
	}
	return 0, nil
}

// ObservedProxy is what the kernel knows of who a proxy is.
type ObservedProxy struct {
	Cgroup  uint64 // 0: its UID alone
	Listens bool
}

// ObservedProxies returns those of the proxies of these namespaces, by cookie. A few
// map reads each, without the lock.
func (d *Datapath) ObservedProxies(cookies []uint64) (map[uint64][]ObservedProxy, error) {
	tables, err := bpfmap.OpenTablesToRead(d.Paths().Maps())
	if err != nil {
		return nil, err
	}
	defer tables.Close()
	found := make(map[uint64][]ObservedProxy)
	for _, cookie := range cookies {
		generation, err := tables.Generation(cookie)
		if err != nil {
			return nil, err
		}
		var config bpfmap.BpfConfig
		if _, err := tables.Get("configs", bpfmap.BpfConfigKey{Cookie: cookie, Generation: generation}, &config); err != nil {
			return nil, err
		}
		err = bpfmap.EachProxyID(cookie, config.Seats, func(key bpfmap.BpfProxyKey) error {
			proxy, err := tables.ProxyState(cookie, uint8(key.Seat))
			found[cookie] = append(found[cookie], ObservedProxy{
				Cgroup: proxy.Cgroup, Listens: proxy.Listeners > 0 || proxy.Flags&bpfmap.BpfProxyFlagPROXY_PINNED != 0,
			})
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}

// onRecord runs action on a workload that is on record, while nobody else changes
// the state.
func (d *Datapath) onRecord(key workload.AttachmentID, action func(*bpfmap.Tables, *store.Record, *host.Namespace) error) error {
	return d.Locked(func() error {
		r, ns, err := d.OpenWorkload(key)
		if err != nil {
			return err
		}
		defer ns.Close()
		tables, err := bpfmap.OpenTables(d.Paths().Maps())
		if err != nil {
			return err
		}
		defer tables.Close()
		return action(tables, r, ns)
	})
}

// RejectProxyCgroup takes the place of the proxy from a cgroup that is known not to be
// the proxy's, for as long as the workload is under Weir, and learns the proxy
// anew from the listeners of others. Where there are none yet, connections are
// refused until the proxy listens.
func (d *Datapath) RejectProxyCgroup(key workload.AttachmentID, cgroup uint64) error {
	err := d.onRecord(key, func(tables *bpfmap.Tables, r *store.Record, ns *host.Namespace) error {
		if !slices.Contains(r.RejectedCgroups, cgroup) {
			r.RejectedCgroups = append(r.RejectedCgroups, cgroup)
		}
		if err := d.Paths().WriteRecord(r); err != nil {
			return err
		}
		w := r.Desired()
		var proxyIDs []uint8
		for i := range w.All() {
			proxy, err := tables.ProxyState(r.Cookie, w.ProxyID(i))
			if err != nil {
				return err
			}
			if proxy.Cgroup == cgroup {
				proxyIDs = append(proxyIDs, w.ProxyID(i))
			}
		}
		if len(proxyIDs) == 0 {
			return nil
		}
		if err := tables.DeleteProxy(r.Cookie, proxyIDs, w); err != nil {
			return err
		}
		_, err := d.Ensure(tables, r, ns)
		return err
	})
	if err != nil {
		return fmt.Errorf("reject cgroup %d of workload %s: %w", cgroup, key, err)
	}
	return nil
}
