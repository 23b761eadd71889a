// SPDX-License-Identifier: MPL-2.0

package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

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
	Go       string    `json:"go"`
	Iptables string    `json:"iptables"`
	SDK      string    `json:"consul_sdk"`
	Revision string    `json:"revision"`
	Date     time.Time `json:"date"`
}

func (m machine) String() string {
	kind := "machine"
	if m.Virtual {
		kind = "virtual machine"
	}
	return fmt.Sprintf("%s with %d cores (%s), %d MiB, Linux %s, load %s at the start; %s, %s, consul/sdk %s, Weir %s, %s.",
		strings.ToUpper(kind[:1])+kind[1:], m.Cores, m.CPU, m.Memory, m.Kernel, m.Load, m.Go, m.Iptables, m.SDK, m.Revision,
		m.Date.Format(time.DateOnly))
}

func describeMachine(cpus []int, revision string) (machine, error) {
	m := machine{Cores: len(cpus), Go: runtime.Version(), Revision: revision, Date: time.Now()}
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
		for _, module := range build.Deps {
			if module.Path == "github.com/hashicorp/consul/sdk" {
				m.SDK = module.Version
			}
		}
	}
	return m, nil
}
