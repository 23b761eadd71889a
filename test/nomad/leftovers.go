// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ExpectNothingLeft waits until the node holds nothing of allocations any more. All
// jobs must have been stopped.
func (n *Node) ExpectNothingLeft() {
	n.tb.Helper()
	n.rememberIdentities()
	if len(n.ids.allocs) == 0 {
		n.tb.Error("no allocation has run: nothing can be left")
	}
	eventually(n.tb, 90*time.Second, n.Leftovers, "nothing to be left")
}

// Leftovers is an error that names each namespace, interface, bridge port, firewall
// rule, IP lease, CNI result, pin, record, cgroup and process of allocations.
func (n *Node) Leftovers() error {
	n.rememberIdentities()
	return errors.Join(n.leftFiles(), n.leftLinks(), n.leftRules(), n.leftWorkloads(), n.leftProcesses(), n.leftCgroups())
}

// leftFiles looks at directories in which each file is an allocation's.
func (n *Node) leftFiles() error {
	var problems []error
	for _, place := range []struct{ what, pattern, except string }{
		{"network namespace", "/run/netns/*", "^$"},
		{"network namespace of Docker", "/run/docker/netns/*", "^default$"},
		{"IP lease", "/run/cni/*/*", `^(lock|last_reserved_ip\.\d+)$`},
		{"IP lease", "/var/lib/cni/networks/*/*", `^(lock|last_reserved_ip\.\d+)$`},
		{"CNI result", "/var/lib/cni/results/*", "^$"},
		{"pinned program", "/sys/fs/bpf/weir/lookups/*", "^$"},
		{"record", "/run/weir/workloads/*", "^$"},
		{"record of a network", "/run/weir/networks/*", "^$"},
		{"IP lease", "/run/weir/leases/*/*", `^(lock|last_reserved_ip\.\d+)$`},
	} {
		// The node's names, not ours: a link on the way would lead to our own.
		files, err := filepath.Glob(n.Path(place.pattern))
		if err != nil {
			return err
		}
		for _, file := range files {
			if dockersGarbage(place.what, file) {
				continue
			}
			if !regexp.MustCompile(place.except).MatchString(filepath.Base(file)) {
				problems = append(problems, fmt.Errorf("%s: %s", place.what, strings.TrimPrefix(file, n.Path("/"))))
			}
		}
	}
	return errors.Join(problems...)
}

// dockersGarbage tells a file that a namespace was mounted on: Docker unmounts it
// at once, and removes the file within a minute.
func dockersGarbage(what, file string) bool {
	var disk unix.Statfs_t
	return what == "network namespace of Docker" && unix.Statfs(file, &disk) == nil && disk.Type != unix.NSFS_MAGIC
}

// leftLinks looks at the node's interfaces: bridges stay, what is plugged into
// them does not.
func (n *Node) leftLinks() error {
	file, err := netns.GetFromPath(n.machine.net.Path)
	if err != nil {
		return err
	}
	defer file.Close()
	handle, err := netlink.NewHandleAt(file)
	if err != nil {
		return err
	}
	defer handle.Close()
	links, err := handle.LinkList()
	if err != nil {
		return err
	}
	var problems []error
	for _, link := range links {
		if name := link.Attrs().Name; link.Type() != "bridge" && name != "lo" && name != "eth0" {
			problems = append(problems, fmt.Errorf("interface: %s, %s", name, link.Type()))
		}
	}
	return errors.Join(problems...)
}

// allocIDPattern is in the comment of each rule that a CNI plugin makes for an
// allocation, and chainPattern is a chain of one.
const (
	allocIDPattern = `[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`
	chainPattern   = `\bCNI-(DN-|SN-)?[0-9a-f]{10,}`
)

func (n *Node) leftRules() error {
	rules, err := n.Try("nft", "list", "ruleset")
	if err != nil {
		return err
	}
	var problems []error
	ofAllocation := regexp.MustCompile(allocIDPattern + "|" + chainPattern)
	for line := range strings.Lines(rules) {
		if strings.HasPrefix(line, "table inet weir ") {
			problems = append(problems, fmt.Errorf("rules of networks: %s", strings.TrimSpace(line)))
		}
		if ofAllocation.MatchString(line) || strings.Contains(line, `comment "weir: `) || strings.Contains(line, `/* weir: `) {
			problems = append(problems, fmt.Errorf("rule: %s", strings.TrimSpace(line)))
		}
	}
	return errors.Join(problems...)
}

func (n *Node) leftWorkloads() error {
	if _, err := os.Stat(n.Path("/sys/fs/bpf/weir")); errors.Is(err, os.ErrNotExist) {
		return nil // Weir was taken off the node, or is not on it
	}
	list, err := n.tryWorkloads()
	if err != nil {
		return err
	}
	// A gateway that registered itself stays in Consul.
	list = slices.DeleteFunc(list, func(w Workload) bool { return w.Agent != nil && w.Agent.State == "unclaimed" })
	if len(list) > 0 {
		return fmt.Errorf("workloads: %+v", list)
	}
	return nil
}

// leftProcesses looks for all that is not a service of the node, a thread of one
// that Docker runs beside itself, or this look itself.
func (n *Node) leftProcesses() error {
	entries, err := filepath.Glob(n.Path("/proc/[0-9]*"))
	if err != nil {
		return err
	}
	service := regexp.MustCompile(`^(bash \S+/init\.sh |consul agent|nomad agent|\S*dockerd |\S*containerd --config|(\S*/)?weir agent)`)
	var problems []error
	for _, entry := range entries {
		text, err := os.ReadFile(filepath.Join(entry, "cmdline"))
		line := strings.TrimSpace(strings.ReplaceAll(string(text), "\x00", " "))
		if err != nil || line == "" {
			continue // it has ended
		}
		if !service.MatchString(line) {
			problems = append(problems, fmt.Errorf("process %s: %s", filepath.Base(entry), line))
		}
	}
	return errors.Join(problems...)
}

func (n *Node) leftCgroups() error {
	var problems []error
	n.eachCgroup(func(dir string) { problems = append(problems, fmt.Errorf("cgroup: %s", dir)) })
	return errors.Join(problems...)
}

// rememberIdentities reads from the disk what the node has started.
func (n *Node) rememberIdentities() {
	for pattern, names := range map[string]map[string]bool{
		"upper/var/lib/nomad/alloc/*": n.ids.allocs, "docker/containers/*": n.ids.containers,
	} {
		files, err := filepath.Glob(filepath.Join(n.machine.dir, pattern))
		if err != nil {
			n.tb.Errorf("read the node's disk: %v", err)
		}
		for _, file := range files {
			names[filepath.Base(file)] = true
		}
	}
}

// eachCgroup calls f for the groups of the node's tasks, in every hierarchy.
func (n *Node) eachCgroup(f func(dir string)) {
	allocID := regexp.MustCompile(allocIDPattern)
	for _, pattern := range []string{
		"*/nomad/*", "nomad.slice/*/*.scope", "*/nomad.slice/*/*.scope", "*/nomad/*/*",
		"*/docker/*", "system.slice/docker-*.scope", "*/system.slice/docker-*.scope",
	} {
		dirs, err := filepath.Glob(filepath.Join("/sys/fs/cgroup", pattern))
		if err != nil {
			n.tb.Errorf("look for cgroups: %v", err)
		}
		for _, dir := range dirs {
			id := allocID.FindString(filepath.Base(dir))
			container := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(dir), "docker-"), ".scope")
			if n.ids.allocs[id] || n.ids.containers[container] {
				f(dir)
			}
		}
	}
}

// removeCgroups takes away what a node that lost its power left.
func (n *Node) removeCgroups() {
	eventually(n.tb, 10*time.Second, func() error {
		var problems []error
		n.eachCgroup(func(dir string) {
			if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
				problems = append(problems, fmt.Errorf("remove %s: %w", dir, err))
			}
		})
		return errors.Join(problems...)
	}, "removal of cgroups")
}
