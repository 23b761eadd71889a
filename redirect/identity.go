// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ObservedProxy is what the kernel knows of who a proxy is.
type ObservedProxy struct {
	Cgroup  uint64 // 0: its UID alone
	Listens bool
}

// ObservedProxies returns those of the proxies of these namespaces, by cookie. A few
// map reads each, without the lock.
func (d *Datapath) ObservedProxies(cookies []uint64) (map[uint64][]ObservedProxy, error) {
	tables, err := openTablesToRead(d.paths.maps())
	if err != nil {
		return nil, err
	}
	defer tables.Close()
	found := make(map[uint64][]ObservedProxy)
	for _, cookie := range cookies {
		generation, err := tables.generation(cookie)
		if err != nil {
			return nil, err
		}
		var config bpfConfig
		if _, err := tables.get("configs", bpfConfigKey{Cookie: cookie, Generation: generation}, &config); err != nil {
			return nil, err
		}
		err = eachProxyID(cookie, config.Seats, func(key bpfProxyKey) error {
			proxy, err := tables.proxyState(cookie, uint8(key.Seat))
			found[cookie] = append(found[cookie], ObservedProxy{
				Cgroup: proxy.Cgroup, Listens: proxy.Listeners > 0 || proxy.Flags&bpfProxyFlagPROXY_PINNED != 0,
			})
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}

// CgroupPath returns the path of a cgroup below the root of the hierarchy, as
// /proc/<pid>/cgroup has it. It wraps os.ErrNotExist where the cgroup is gone.
func CgroupPath(id uint64) (string, error) {
	const kernfs = 0xfe // FILEID_KERNFS: a handle is the ID itself (Linux 5.5)
	root, err := findCgroupRoot("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	mount, err := os.Open(root)
	if err != nil {
		return "", fmt.Errorf("open cgroup root: %w", err)
	}
	defer mount.Close()
	fd, err := unix.OpenByHandleAt(int(mount.Fd()), unix.NewFileHandle(kernfs, binary.NativeEndian.AppendUint64(nil, id)), unix.O_PATH|unix.O_CLOEXEC)
	if errors.Is(err, unix.ESTALE) {
		return "", fmt.Errorf("open cgroup %d: %w", id, os.ErrNotExist)
	}
	if err != nil {
		return "", fmt.Errorf("open cgroup %d: %w", id, err)
	}
	defer unix.Close(fd)
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "", fmt.Errorf("name cgroup %d: %w", id, err)
	}
	if path, err = filepath.Rel(root, path); err != nil {
		return "", fmt.Errorf("name cgroup %d: %w", id, err)
	}
	return "/" + path, nil
}

// CgroupID is the reverse of CgroupPath.
func CgroupID(path string) (uint64, error) {
	root, err := findCgroupRoot("/proc/self/mountinfo")
	if err != nil {
		return 0, err
	}
	var stat unix.Stat_t
	if err := unix.Stat(filepath.Join(root, path), &stat); err != nil {
		return 0, fmt.Errorf("stat cgroup %s: %w", path, err)
	}
	return stat.Ino, nil
}

// cgroupOfProcess is the path of a process's cgroup in the v2 hierarchy; unified is
// false where it is in none.
func cgroupOfProcess(pid string) (path string, unified bool, err error) {
	data, err := os.ReadFile(filepath.Join("/proc", pid, "cgroup"))
	if err != nil {
		return "", false, fmt.Errorf("read cgroup: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		if path, unified = strings.CutPrefix(strings.TrimSpace(line), "0::"); unified {
			return path, true, nil
		}
	}
	return "", false, nil
}

// CgroupsIn returns the cgroups of the processes in each of the namespaces, each
// once; none for a namespace that is gone. It walks all processes of the node.
func CgroupsIn(namespaces ...string) (map[string][]string, error) {
	names, found := make(map[uint64]string), make(map[string][]string)
	for _, path := range namespaces {
		ns, err := openNamespace(path)
		if errors.Is(err, ErrNetNSGone) {
			continue
		}
		if err != nil {
			return nil, err
		}
		defer ns.Close()
		names[ns.inode] = path
	}
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	for _, process := range processes {
		if _, err := strconv.Atoi(process.Name()); err != nil {
			continue
		}
		var stat unix.Stat_t
		if unix.Stat(filepath.Join("/proc", process.Name(), "ns/net"), &stat) != nil {
			continue // it ended
		}
		name, wanted := names[stat.Ino]
		if !wanted {
			continue
		}
		path, unified, err := cgroupOfProcess(process.Name())
		if err == nil && unified && !slices.Contains(found[name], path) {
			found[name] = append(found[name], path)
		}
	}
	return found, nil
}

// ListeningAs returns the TCP ports on which sockets of a UID listen in a
// namespace.
func ListeningAs(path string, uid uint32) (ports []uint16, err error) {
	ns, err := openNamespace(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	sockets, err := ns.listening()
	for _, socket := range sockets {
		if socket.uid == uid {
			ports = append(ports, socket.port)
		}
	}
	return ports, err
}

// onRecord runs action on a workload that is on record, while nobody else changes
// the state.
func (d *Datapath) onRecord(key AttachmentID, action func(*tables, *record, *namespace) error) error {
	return d.locked(func() error {
		r, err := d.paths.readRecord(key)
		if err != nil {
			return err
		}
		ns, err := r.open()
		if err != nil {
			return err
		}
		defer ns.Close()
		tables, err := openTables(d.paths.maps())
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
func (d *Datapath) RejectProxyCgroup(key AttachmentID, cgroup uint64) error {
	err := d.onRecord(key, func(tables *tables, r *record, ns *namespace) error {
		if !slices.Contains(r.RejectedCgroups, cgroup) {
			r.RejectedCgroups = append(r.RejectedCgroups, cgroup)
		}
		if err := d.paths.writeRecord(r); err != nil {
			return err
		}
		w := r.desired()
		var proxyIDs []uint8
		for i := range w.all() {
			proxy, err := tables.proxyState(r.Cookie, w.proxyID(i))
			if err != nil {
				return err
			}
			if proxy.Cgroup == cgroup {
				proxyIDs = append(proxyIDs, w.proxyID(i))
			}
		}
		if len(proxyIDs) == 0 {
			return nil
		}
		if err := tables.deleteProxy(r.Cookie, proxyIDs, w); err != nil {
			return err
		}
		_, err := d.ensure(tables, r, ns)
		return err
	})
	if err != nil {
		return fmt.Errorf("reject cgroup %d of workload %s: %w", cgroup, key, err)
	}
	return nil
}
