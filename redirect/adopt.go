// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"

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
		at, roles := socket.roles(w)
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
		fd, cgroup, err := ns.copySocket(l.inode, paths)
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

func roleFlag(role bpfListenerRole) bpfProxyFlag {
	switch role {
	case bpfListenerRoleLISTENER_OUTBOUND4:
		return bpfProxyFlagPROXY_LISTENS4
	case bpfListenerRoleLISTENER_OUTBOUND6:
		return bpfProxyFlagPROXY_LISTENS6
	}
	return 0
}

// deleteRegistered lets the kernel learn a proxy anew once the one that user space
// took in has no listener left. The kernel does not count those, so it waits.
func (t *tables) deleteRegistered(cookie uint64, proxyID uint8, proxy bpfProxy, w Workload) (bpfProxy, error) {
	if proxy.Flags&bpfProxyFlagPROXY_PINNED == 0 {
		return proxy, nil
	}
	if any, err := t.anyListener(cookie, proxyID, w); err != nil || any {
		return proxy, err
	}
	return bpfProxy{}, t.put("proxies", proxyKey(cookie, proxyID), bpfProxy{}, ebpf.UpdateAny)
}

// deleteProxy takes every listener of the proxies in these proxy IDs out, and the
// proxies with them.
func (t *tables) deleteProxy(cookie uint64, proxyIDs []uint8, w Workload) error {
	var kept []proxyPort
	for _, port := range w.ports() {
		if !slices.Contains(proxyIDs, port.proxyID) {
			kept = append(kept, port)
		}
	}
	if err := t.deleteListenersOn(cookie, kept); err != nil {
		return err
	}
	for _, proxyID := range proxyIDs {
		if err := t.put("proxies", proxyKey(cookie, proxyID), bpfProxy{}, ebpf.UpdateAny); err != nil {
			return err
		}
	}
	return nil
}

// anyListener reports whether a listener is registered on whatever port that is
// not another proxy's.
func (t *tables) anyListener(cookie uint64, proxyID uint8, w Workload) (bool, error) {
	table, err := t.table("listeners")
	if err != nil {
		return false, err
	}
	var key bpfListenerKey
	var socket uint64
	rows := table.Iterate()
	for rows.Next(&key, &socket) {
		if key.Cookie != cookie {
			continue
		}
		if port, ok := w.portOf(key.Port); !ok || port.proxyID == proxyID {
			return true, nil
		}
	}
	if err := rows.Err(); err != nil {
		return false, fmt.Errorf("walk listeners: %w", err)
	}
	return false, nil
}

func (t *tables) missingFrom(cookie uint64, roles []bpfListenerRole, port uint16, socket uint64) (missing []bpfListenerRole, err error) {
	for _, role := range roles {
		slots, err := t.registered(cookie, role, port)
		if err != nil {
			return nil, err
		}
		there := false
		for _, registered := range slots {
			there = there || registered == socket
		}
		if !there {
			missing = append(missing, role)
		}
	}
	return missing, nil
}

// registerListener puts a socket into the first free slot of each role.
func (t *tables) registerListener(cookie uint64, roles []bpfListenerRole, port uint16, fd int) error {
	for _, role := range roles {
		var err error
		for slot := range uint16(listenerSlots) {
			err = t.put("listeners", listenerKey(cookie, role, port, slot), uint64(fd), ebpf.UpdateNoExist)
			if !errors.Is(err, ebpf.ErrKeyExist) {
				break
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

var errNoOwner = errors.New("no process has the socket")

// copySocket returns a copy of the descriptor of a socket, which the caller
// closes, and the cgroup of the process that it is copied from.
func (ns *namespace) copySocket(inode uint32, paths Paths) (fd int, cgroup uint64, err error) {
	err = ns.eachOwner(inode, func(pid, number int) (done bool, err error) {
		fd, err = copyDescriptor(pid, number)
		if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EBADF) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		if cgroup, err = processCgroup(pid, paths); err != nil {
			unix.Close(fd)
		}
		return true, err
	})
	if err != nil {
		return -1, 0, err
	}
	return fd, cgroup, nil
}

// eachOwner calls visit with the processes of the namespace that hold a socket,
// and the descriptors by which they do, until it is done; errNoOwner where it
// never is.
func (ns *namespace) eachOwner(inode uint32, visit func(pid, number int) (done bool, err error)) error {
	want := fmt.Sprintf("socket:[%d]", inode)
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return fmt.Errorf("list processes: %w", err)
	}
	for _, process := range processes {
		pid, err := strconv.Atoi(process.Name())
		if err != nil || !ns.holds(pid) {
			continue
		}
		dir := filepath.Join("/proc", process.Name(), "fd")
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue // it ended
		}
		for _, entry := range fds {
			if target, err := os.Readlink(filepath.Join(dir, entry.Name())); err != nil || target != want {
				continue
			}
			number, err := strconv.Atoi(entry.Name())
			if err != nil {
				continue
			}
			if done, err := visit(pid, number); done || err != nil {
				return err
			}
		}
	}
	return errNoOwner
}

func (ns *namespace) holds(pid int) bool {
	var stat unix.Stat_t
	return unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &stat) == nil && stat.Ino == ns.inode
}

func copyDescriptor(pid, number int) (int, error) {
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", pid, err)
	}
	defer unix.Close(process)
	fd, err := unix.PidfdGetfd(process, number, 0)
	if err != nil {
		return -1, fmt.Errorf("copy descriptor %d of process %d: %w", number, pid, err)
	}
	return fd, nil
}

// processCgroup is the ID of a process's cgroup in the v2 hierarchy.
func processCgroup(pid int, paths Paths) (uint64, error) {
	path, unified, err := cgroupOfProcess(strconv.Itoa(pid))
	if err != nil || !unified {
		return 0, err
	}
	root, err := findCgroupRoot("/proc/self/mountinfo")
	if err != nil {
		root = paths.CgroupRoot
	}
	var stat unix.Stat_t
	if err := unix.Stat(filepath.Join(root, path), &stat); err != nil {
		return 0, fmt.Errorf("stat cgroup of process %d: %w", pid, err)
	}
	return stat.Ino, nil
}
