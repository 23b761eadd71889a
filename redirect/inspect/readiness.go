// SPDX-License-Identifier: MPL-2.0

package inspect

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/probe"
	"github.com/weirmesh/weir/redirect/program"
	"golang.org/x/sys/unix"
)

// Readiness checks the kernel, the mounts and the hooks of this node. It loads
// nothing that stays, attaches nothing and changes nothing.
func (d *Reader) Readiness() []health.Check {
	return append(append(KernelReadiness("/"), d.MountReadiness()...), d.HookReadiness()...)
}

// KernelReadiness asks the kernel for each feature, and reads below root what
// says how it is set up.
func KernelReadiness(root string) []health.Check {
	c := &health.Checks{Group: "kernel"}
	CheckRequirements(c, probe.Requirements())
	if btf, err := os.Stat(filepath.Join(root, "sys/kernel/btf/vmlinux")); err == nil && btf.Size() > 0 {
		c.OK("kernel-btf", "the kernel has BTF")
	} else {
		c.Fault("kernel-btf", "boot a kernel that is built with CONFIG_DEBUG_INFO_BTF=y, as those of the distributions are",
			"the kernel has no BTF: %s is not there", filepath.Join(root, "sys/kernel/btf/vmlinux"))
	}
	if err := probe.Families(); err == nil {
		c.OK("socket-families", "the egress guard sees sockets of every family")
	} else {
		c.Warn("socket-families", "boot a kernel with CONFIG_SECURITY_NETWORK and BTF, on arm64 Linux 6.4 or newer; until then take CAP_NET_RAW from tasks that need an egress guard",
			"the egress guard would not see packet, vsock and XDP sockets: %v", err)
	}
	switch mode := lockdown(filepath.Join(root, "sys/kernel/security/lockdown")); mode {
	case "", "none":
		c.OK("kernel-lockdown", "the kernel is not locked down")
	default: // neither mode forbids programs of these types; none of them reads the kernel's memory by address
		c.OK("kernel-lockdown", "the kernel is locked down for %s, which forbids nothing that Weir does", mode)
	}
	value := func(path string) string {
		text, _ := os.ReadFile(filepath.Join(root, "proc/sys", path)) // "" where the kernel has none
		return strings.TrimSpace(string(text))
	}
	switch jit := value("net/core/bpf_jit_enable"); jit {
	case "0":
		c.Fault("bpf-jit", "'sysctl -w net.core.bpf_jit_enable=1', and the same in /etc/sysctl.d",
			"net.core.bpf_jit_enable is 0: the kernel does not compile programs, and takes none of Weir's so")
	case "":
		c.OK("bpf-jit", "the kernel always compiles programs, it has no net.core.bpf_jit_enable")
	default:
		c.OK("bpf-jit", "programs are compiled, net.core.bpf_jit_enable is %s", jit)
	}
	if forward := value("net/ipv4/ip_forward"); forward == "1" {
		c.OK("ip-forward", "net.ipv4.ip_forward is 1")
	} else {
		c.Warn("ip-forward", "'sysctl -w net.ipv4.ip_forward=1', and the same in /etc/sysctl.d",
			"net.ipv4.ip_forward is %q: allocations on a bridge reach nothing outside; cni/weir sets it with the first allocation, Nomad's bridge does not", forward)
	}
	if unprivileged := value("kernel/unprivileged_bpf_disabled"); unprivileged != "" {
		c.OK("unprivileged-bpf", "kernel.unprivileged_bpf_disabled is %s; any value is fine, Weir runs as root", unprivileged)
	}
	return c.List
}

func CheckRequirements(c *health.Checks, needs []probe.Requirement) {
	for _, need := range needs {
		switch err := need.ProbeFor(); {
		case err == nil:
			c.OK("kernel-feature", "%s, needed %s", need.What, need.Why)
		case errors.Is(err, ebpf.ErrNotSupported):
			c.Fault("kernel-feature", "boot Linux 6.1 or newer, or a kernel that carries the feature",
				"the kernel lacks %s, needed %s (Linux %s)", need.What, need.Why, need.Since)
		default:
			c.Fault("kernel-feature", "run weir as root, with CAP_BPF and CAP_NET_ADMIN; in a container also see its seccomp profile",
				"the kernel cannot be asked for %s: %v", need.What, err)
		}
	}
}

// lockdown is the mode in force: the one in brackets; "" where there is none.
func lockdown(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(text), "[")
	mode, _, _ := strings.Cut(rest, "]")
	return mode
}

// MountReadiness checks the root of cgroup v2 and the bpffs.
func (d *Reader) MountReadiness() []health.Check {
	c := &health.Checks{Group: "mounts"}
	if root, err := d.paths.OpenCgroupRoot(); err != nil {
		c.Fault("cgroup-root", "mount cgroup v2, as by 'mount -t cgroup2 none /sys/fs/cgroup', and run weir in the host's cgroup namespace", "%v", err)
	} else {
		c.OK("cgroup-root", "the root of cgroup v2 is %s", root.Name())
		_ = root.Close() // it was only read
	}
	const standard = "/sys/fs/bpf"
	parent := filepath.Dir(d.paths.PinDir)
	var fs unix.Statfs_t
	err := unix.Statfs(parent, &fs)
	readOnly := err == nil && fs.Flags&unix.ST_RDONLY != 0
	known := knowsBPFFS("/proc/filesystems")
	switch below := d.paths.PinDir == standard || strings.HasPrefix(d.paths.PinDir, standard+"/"); {
	case err == nil && fs.Type == unix.BPF_FS_MAGIC && readOnly:
		c.Fault("bpffs", "'mount -o remount,rw "+parent+"'", "the bpffs at %s is read-only", parent)
	case err == nil && fs.Type == unix.BPF_FS_MAGIC:
		c.OK("bpffs", "a bpffs is mounted at %s", parent)
	case below && known:
		c.OK("bpffs", "no bpffs is mounted at %s yet; the agent and 'weir load' mount it", standard)
	case below:
		c.Fault("bpffs", "boot a kernel that is built with CONFIG_BPF_SYSCALL=y", "the kernel knows no bpffs")
	default:
		c.Fault("bpffs", "'mount -t bpf bpf "+parent+"', or set pin_dir to a directory below /sys/fs/bpf", "pin_dir %s is not in a bpffs", d.paths.PinDir)
	}
	return c.List
}

func knowsBPFFS(path string) bool {
	text, err := os.ReadFile(path)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 0 && fields[len(fields)-1] == "bpf" {
			return true
		}
	}
	return false
}

// HookReadiness names the programs of others where Weir's are attached. What
// each of them does only its owner knows.
func (d *Reader) HookReadiness() []health.Check {
	c := &health.Checks{Group: "hooks"}
	root, err := d.paths.OpenCgroupRoot()
	if err != nil {
		return nil // told among the mounts
	}
	defer root.Close()
	sets, err := program.SetsAt(root)
	var others []Other
	if err == nil {
		others, err = d.others(root, d.OwnSets(sets))
		d.NameOthers(others)
	}
	if err != nil {
		c.Fault("other-program", "run weir as root, with CAP_BPF and CAP_NET_ADMIN", "what is attached to %s cannot be looked at: %v", root.Name(), err)
		return c.List
	}
	for _, other := range others {
		what := other.String()
		switch {
		case other.Exclusive:
			c.Fault("exclusive-program", fmt.Sprintf("have its owner attach it with BPF_F_ALLOW_MULTI, or detach it by '%s'", other.detach(root.Name())),
				"%s has this hook for itself: Weir's cannot be attached", what)
		case other.Weir:
			c.OK("other-program", "%s is of another instance of Weir and serves its own namespaces", what)
		case other.decidesConnections():
			c.Warn("other-program", "see what its owner does with connections of allocations in the mesh; where it leaves them alone, nothing is to be done",
				"%s %s", what, other.Effect)
		default:
			c.OK("other-program", "%s %s, and decides no connection", what, other.Effect)
		}
	}
	if len(others) == 0 {
		c.OK("other-program", "no program of others is on the hooks that Weir uses")
	}
	return c.List
}

// String names a program of somebody else's, where it is and who has it.
func (o Other) String() string {
	text := fmt.Sprintf("program %s (ID %d) at %s", o.Name, o.ID, o.Hook)
	if o.Order != "" {
		text += ", which runs " + o.Order + " Weir's,"
	}
	if o.Pinned != "" {
		return text + " pinned at " + o.Pinned
	}
	if o.Owner != "" {
		return text + " of " + o.Owner
	}
	return fmt.Sprintf("%s loaded by UID %d", text, o.UID)
}

// detach is the command that takes it off its hook of the root.
func (o Other) detach(root string) string {
	for _, h := range program.Hooks() {
		if h.Attach.String() == o.Hook {
			return program.Detach(root, h.Attach, ebpf.ProgramID(o.ID))
		}
	}
	return "bpftool cgroup show " + root
}

// decidesConnections reports a program that can refuse a connection, or send it
// elsewhere.
func (o Other) decidesConnections() bool {
	for _, h := range program.Hooks() {
		if h.Attach.String() == o.Hook {
			switch h.Attach {
			case ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg,
				ebpf.AttachCGroupGetsockopt:
				return true
			}
		}
	}
	return false
}
