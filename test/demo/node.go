// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/test/spawn"
)

// Where the demo keeps what it makes. The places are fixed, so that a run
// finds and removes what a killed one has left.
const (
	runDir     = "/run/weir-demo"
	pinDir     = "/sys/fs/bpf/weir-demo"
	lockFile   = "/run/weir-demo.lock"
	groupName  = "weir-demo" // below the cgroup-v2 root
	bridgeName = "nomad"
	gateway    = "172.26.64.1" // the bridge's address: the node's own for its allocations
)

var errBusy = errors.New("another demo is running on this machine")

// node is the stage: a machine's network in a namespace of its own, with the
// bridge that Nomad would make, and a place for every file and cgroup.
type node struct {
	netns  string // path of the node's namespace
	cgroup string // directory of the demo's group
	lock   *os.File
	allocs []*allocation

	programs []*spawn.Process // beside the allocations' own
}

// newNode clears what an earlier run has left and makes the stage.
func newNode() (*node, error) {
	lock, err := os.OpenFile(lockFile, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the demo: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(errBusy, lock.Close())
	}
	root, err := cgroupRoot()
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	n := &node{
		netns:  filepath.Join(runDir, "netns", "node"),
		cgroup: filepath.Join(root, groupName),
		lock:   lock,
	}
	if err := n.clear(); err != nil {
		return nil, errors.Join(fmt.Errorf("clear an earlier run: %w", err), lock.Close())
	}
	if err := n.build(); err != nil {
		return nil, errors.Join(err, n.close())
	}
	return n, nil
}

func (n *node) build() error {
	for _, dir := range []string{"netns", "state", "plugins"} {
		if err := os.MkdirAll(filepath.Join(runDir, dir), 0o755); err != nil {
			return fmt.Errorf("make the stage: %w", err)
		}
	}
	if err := os.Mkdir(n.cgroup, 0o755); err != nil {
		return fmt.Errorf("make cgroup: %w", err)
	}
	if err := makeNetNS(n.netns); err != nil {
		return err
	}
	return spawn.Do(n.netns, func() error {
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridgeName}}
		if err := netlink.LinkAdd(bridge); err != nil {
			return fmt.Errorf("add bridge: %w", err)
		}
		return up(bridge, netip.MustParsePrefix(gateway+"/20"))
	})
}

// start starts a program of the node's own. What it writes goes to a log.
func (n *node) start(name string, spec spawn.Spec) (*spawn.Process, error) {
	log, err := os.Create(filepath.Join(runDir, name+".log"))
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer log.Close()
	spec.Stdout, spec.Stderr = log, log
	process, err := spawn.Start(spec)
	if err != nil {
		return nil, err
	}
	n.programs = append(n.programs, process)
	return process, nil
}

// showLogs prints the ends of the logs, for whoever has to find out.
func (n *node) showLogs(p *printer) {
	const lines = 8
	logs, _ := filepath.Glob(filepath.Join(runDir, "*.log"))
	more, _ := filepath.Glob(filepath.Join(runDir, "*", "*.log"))
	for _, path := range append(logs, more...) {
		text, err := os.ReadFile(path)
		if err != nil || len(text) == 0 {
			continue
		}
		p.note("%s ends with:", path)
		all := strings.Split(strings.TrimSpace(string(text)), "\n")
		for _, line := range all[max(0, len(all)-lines):] {
			fmt.Fprintf(p.out, "     %s\n", line)
		}
	}
}

// connect joins an allocation's namespace to the bridge, as Nomad's own
// bridge plugin does before ours is called.
func (n *node) connect(a *allocation) error {
	if err := makeNetNS(a.netns); err != nil {
		return err
	}
	target, err := os.Open(a.netns)
	if err != nil {
		return fmt.Errorf("open namespace: %w", err)
	}
	defer target.Close()
	err = spawn.Do(n.netns, func() error {
		bridge, err := netlink.LinkByName(bridgeName)
		if err != nil {
			return fmt.Errorf("find bridge: %w", err)
		}
		veth := &netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: a.veth(), MasterIndex: bridge.Attrs().Index},
			PeerName:      ifName,
			PeerNamespace: netlink.NsFd(int(target.Fd())),
		}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("add veth: %w", err)
		}
		return up(veth)
	})
	if err != nil {
		return err
	}
	return spawn.Do(a.netns, func() error {
		loopback, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		if err := up(loopback); err != nil {
			return err
		}
		eth0, err := netlink.LinkByName(ifName)
		if err != nil {
			return fmt.Errorf("find %s: %w", ifName, err)
		}
		if err := up(eth0, a.address); err != nil {
			return err
		}
		route := &netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: net.ParseIP(gateway)}
		if err := netlink.RouteAdd(route); err != nil {
			return fmt.Errorf("add route: %w", err)
		}
		return nil
	})
}

func up(link netlink.Link, addresses ...netip.Prefix) error {
	for _, prefix := range addresses {
		address := &netlink.Addr{IPNet: &net.IPNet{
			IP:   prefix.Addr().AsSlice(),
			Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen()),
		}}
		if err := netlink.AddrAdd(link, address); err != nil {
			return fmt.Errorf("add address %s to %s: %w", prefix, link.Attrs().Name, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", link.Attrs().Name, err)
	}
	return nil
}

// makeNetNS makes a network namespace that lives at path until it is
// unmounted.
func makeNetNS(path string) error {
	file, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("make namespace: %w", err)
	}
	if err := file.Close(); err != nil {
		return fmt.Errorf("make namespace: %w", err)
	}
	return spawn.Do("", func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make namespace: %w", err)
		}
		if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount namespace at %s: %w", path, err)
		}
		return nil
	})
}

// close removes the stage and says what it could not remove.
func (n *node) close() error {
	errs := []error{n.clear()}
	for _, path := range []string{runDir, pinDir, n.cgroup} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("%s is still there", path))
		}
	}
	return errors.Join(append(errs, os.Remove(lockFile), n.lock.Close())...)
}

// clear removes files, namespaces, cgroups and the data path of this run or
// of an earlier one. What is not there is no error.
func (n *node) clear() error {
	var errs []error
	for _, a := range n.allocs {
		errs = append(errs, a.stop())
	}
	for _, program := range n.programs {
		errs = append(errs, program.Stop(10*time.Second))
	}
	if _, err := datapath().Unload(); err != nil {
		errs = append(errs, fmt.Errorf("unload: %w", err))
	}
	mounts, err := filepath.Glob(filepath.Join(runDir, "netns", "*"))
	errs = append(errs, err)
	for _, path := range mounts {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", path, err))
		}
	}
	errs = append(errs, os.RemoveAll(runDir), removeGroups(n.cgroup))
	return errors.Join(errs...)
}

// removeGroups removes a tree of cgroups, leaves first.
func removeGroups(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove cgroups: %w", err)
	}
	for _, entry := range entries {
		if entry.IsDir() {
			if err := removeGroups(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil {
		return fmt.Errorf("remove cgroup %s: %w", dir, err)
	}
	return nil
}

// cgroupRoot finds where the cgroup-v2 hierarchy is mounted.
func cgroupRoot() (string, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("find cgroup2: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		// "36 35 0:30 / /sys/fs/cgroup rw,... shared:9 - cgroup2 cgroup2 rw"
		before, after, found := strings.Cut(line, " - ")
		fields := strings.Fields(before)
		if found && len(fields) > 4 && fields[3] == "/" && strings.HasPrefix(after, "cgroup2 ") {
			return fields[4], nil
		}
	}
	return "", errors.New("find cgroup2: no cgroup-v2 hierarchy is mounted: mount -t cgroup2 none /sys/fs/cgroup")
}
