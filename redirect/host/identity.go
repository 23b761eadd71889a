// SPDX-License-Identifier: MPL-2.0

package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/moby/sys/mountinfo"
	"github.com/weirmesh/weir/redirect/probe"
	"golang.org/x/sys/unix"
)

// CgroupPath returns the path of a cgroup below the root of the hierarchy, as
// /proc/<pid>/cgroup has it. It wraps os.ErrNotExist where the cgroup is gone.
func CgroupPath(id uint64) (string, error) {
	const kernfs = 0xfe // FILEID_KERNFS: a handle is the ID itself (Linux 5.5)
	root, err := CgroupRoot()
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
	root, err := CgroupRoot()
	if err != nil {
		return 0, err
	}
	var stat unix.Stat_t
	if err := unix.Stat(filepath.Join(root, path), &stat); err != nil {
		return 0, fmt.Errorf("stat cgroup %s: %w", path, err)
	}
	return stat.Ino, nil
}

// CgroupOfProcess is the path of a process's cgroup in the v2 hierarchy; unified is
// false where it is in none.
func CgroupOfProcess(pid string) (path string, unified bool, err error) {
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
// once; an entry without any for a namespace that is empty or gone. It walks all
// processes of the node.
func CgroupsIn(namespaces ...string) (map[string][]string, error) {
	names, found := make(map[uint64]string), make(map[string][]string)
	for _, path := range namespaces {
		found[path] = nil
		ns, err := OpenNamespace(path)
		if errors.Is(err, ErrNetNSGone) {
			continue
		}
		if err != nil {
			return nil, err
		}
		defer ns.Close()
		names[ns.Inode] = path
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
		path, unified, err := CgroupOfProcess(process.Name())
		if err == nil && unified && !slices.Contains(found[name], path) {
			found[name] = append(found[name], path)
		}
	}
	return found, nil
}

// ListeningAs returns the TCP ports on which sockets of a UID listen in a
// namespace.
func ListeningAs(path string, uid uint32) (ports []uint16, err error) {
	ns, err := OpenNamespace(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	sockets, err := ns.Listening()
	for _, socket := range sockets {
		if socket.UID == uid {
			ports = append(ports, socket.Port)
		}
	}
	return ports, err
}

// processCgroup is the ID of a process's cgroup in the v2 hierarchy.
func processCgroup(pid int, cgroupRoot string) (uint64, error) {
	path, unified, err := CgroupOfProcess(strconv.Itoa(pid))
	if err != nil || !unified {
		return 0, err
	}
	root, err := CgroupRoot()
	if err != nil {
		root = cgroupRoot
	}
	var stat unix.Stat_t
	if err := unix.Stat(filepath.Join(root, path), &stat); err != nil {
		return 0, fmt.Errorf("stat cgroup of process %d: %w", pid, err)
	}
	return stat.Ino, nil
}

func ProcessName(pid int) string {
	name := CommandOf(pid)
	if name == "" {
		return "a process that ended"
	}
	return fmt.Sprintf("process %d (%s)", pid, name)
}

// CgroupRoot is where the root of cgroup v2 is mounted. It is asked for in every ADD
// and in every look at a process, and mountinfo has several lines for each allocation:
// where the root is at one of the usual places, a full node is not read.
func CgroupRoot() (string, error) {
	// In another cgroup namespace mountinfo alone says what is its root.
	const initial = 0xEFFFFFFB // CGROUP_NS_INIT_INO of linux/nsfs.h
	var own unix.Stat_t
	if err := unix.Stat("/proc/self/ns/cgroup", &own); err == nil && own.Ino == initial {
		if root := cgroupRootAmong("/sys/fs/cgroup", "/sys/fs/cgroup/unified"); root != "" {
			return root, nil
		}
	}
	return FindCgroupRoot("/proc/self/mountinfo")
}

// cgroupRootAmong is the first of the paths that is the real root of cgroup v2: every
// other directory of it has a file cgroup.type.
func cgroupRootAmong(paths ...string) string {
	for _, path := range paths {
		var fs unix.Statfs_t
		if err := unix.Statfs(path, &fs); err != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		if _, err := os.Lstat(filepath.Join(path, "cgroup.type")); errors.Is(err, os.ErrNotExist) {
			return path
		}
	}
	return ""
}

// FindCgroupRoot reads a file like /proc/self/mountinfo.
func FindCgroupRoot(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("find cgroup v2: %w", err)
	}
	defer file.Close()
	mounts, err := mountinfo.GetMountsFromReader(file, mountinfo.FSTypeFilter("cgroup2"))
	if err != nil {
		return "", fmt.Errorf("find cgroup v2: %w", err)
	}
	for _, mount := range mounts {
		if mount.Root == "/" && filepath.IsAbs(mount.Mountpoint) {
			return mount.Mountpoint, nil
		}
	}
	return "", fmt.Errorf("find cgroup v2: no mount of it, mount it at /sys/fs/cgroup: %w", probe.ErrUnsupported)
}

// CommandOf is the name of a process, as the kernel keeps it, quoted where it has what is
// not printed, line ends too: a process names itself. It is "" where it ended.
func CommandOf(pid int) string {
	name, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "comm"))
	if err != nil {
		return ""
	}
	if text := strings.TrimSuffix(string(name), "\n"); strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(text)
	}
	return strings.TrimSpace(string(name))
}

// Inode is what is found at a path now; 0 where nothing is.
func Inode(path string) uint64 {
	var stat unix.Stat_t
	if unix.Stat(path, &stat) != nil {
		return 0
	}
	return stat.Ino
}
