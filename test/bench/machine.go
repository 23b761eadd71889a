// SPDX-License-Identifier: MPL-2.0

package main

import (
	"debug/buildinfo"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// A machine says where a run was made and with what.
type machine struct {
	CPU      string    `json:"cpu"`
	Cores    int       `json:"cores"`
	Memory   int       `json:"memory_mib"`
	Kernel   string    `json:"kernel"`
	Virtual  bool      `json:"virtual"`
	Load     string    `json:"load_at_start"`
	Attached int       `json:"programs_at_cgroup_root"` // others', at the start
	Go       string    `json:"go"`
	Iptables string    `json:"iptables"`
	SDK      string    `json:"consul_sdk"`          // with the iptables engine
	NFTables string    `json:"consul_sdk_nftables"` // with the nftables engine
	Revision string    `json:"revision"`
	Date     time.Time `json:"date"`
}

func (m machine) String() string {
	others := ""
	if m.Attached > 0 {
		others = fmt.Sprintf("\n\nSomebody else's %d eBPF programs were attached to all cgroups: no floor is without cost.", m.Attached)
	}
	kind := "machine"
	if m.Virtual {
		kind = "virtual machine"
	}
	return fmt.Sprintf("%s with %d cores (%s), %d MiB, Linux %s, load %s at the start; %s, %s, consul/sdk %s and %s, Weir %s, %s.%s",
		strings.ToUpper(kind[:1])+kind[1:], m.Cores, m.CPU, m.Memory, m.Kernel, m.Load, m.Go, m.Iptables, m.SDK, m.NFTables, m.Revision,
		m.Date.Format(time.DateOnly), others)
}

// attachedPrograms counts what somebody attached to the root of all cgroups,
// on the hooks of what is measured.
func attachedPrograms(root string) (int, error) {
	group, err := os.Open(root)
	if err != nil {
		return 0, err
	}
	defer group.Close()
	count := 0
	for _, hook := range []ebpf.AttachType{
		ebpf.AttachCGroupInet4Connect, ebpf.AttachCgroupInet4GetPeername,
		ebpf.AttachCGroupGetsockopt, ebpf.AttachCGroupSockOps,
	} {
		found, err := link.QueryPrograms(link.QueryOptions{Target: int(group.Fd()), Attach: hook})
		if err != nil {
			return 0, fmt.Errorf("query %s at %s: %w", hook, root, err)
		}
		count += len(found.Programs)
	}
	return count, nil
}

func describeMachine(cpus []int, cgroup, nftables, revision string) (machine, error) {
	m := machine{Cores: len(cpus), Go: runtime.Version(), Revision: revision, Date: time.Now()}
	attached, err := attachedPrograms(cgroup)
	if err != nil {
		return m, err
	}
	m.Attached = attached
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return m, fmt.Errorf("get kernel's name: %w", err)
	}
	m.Kernel = unix.ByteSliceToString(name.Release[:])
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return m, fmt.Errorf("get memory size: %w", err)
	}
	m.Memory = int(info.Totalram * uint64(info.Unit) >> 20)
	processors, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(processors)) {
		key, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(key) {
		case "model name":
			m.CPU = strings.TrimSpace(value)
		case "flags":
			m.Virtual = strings.Contains(value+" ", " hypervisor ")
		}
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return m, err
	}
	m.Load, _, _ = strings.Cut(string(load), " ")
	version, err := exec.Command("iptables", "--version").Output()
	if err != nil {
		return m, fmt.Errorf("get version of iptables: %w", err)
	}
	m.Iptables = strings.TrimSpace(string(version))
	if !strings.Contains(m.Iptables, "nf_tables") {
		return m, fmt.Errorf("get version of iptables: %s is not the nf_tables one", m.Iptables)
	}
	if build, ok := debug.ReadBuildInfo(); ok {
		m.SDK = sdkVersion(build)
	}
	build, err := buildinfo.ReadFile(nftables)
	if err != nil {
		return m, fmt.Errorf("get version of Consul's nftables engine: %w", err)
	}
	m.NFTables = sdkVersion(build)
	return m, nil
}

// sdkVersion is the version of consul/sdk that a program was built with.
func sdkVersion(build *debug.BuildInfo) string {
	for _, module := range build.Deps {
		if module.Path == "github.com/hashicorp/consul/sdk" {
			return module.Version
		}
	}
	return "unknown"
}
