// SPDX-License-Identifier: MPL-2.0

// Package store is the state on disk: where an instance keeps it, the record of each
// workload, and the lock that every change holds.
package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/probe"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// Where an instance keeps its state unless it is told otherwise.
const (
	DefaultPinDir   = "/sys/fs/bpf/weir"
	DefaultStateDir = "/run/weir"
)

// Paths says where one instance keeps its state. Zero fields mean the default.
// Two instances with different paths do not see each other, so that several
// can live on one machine in tests.
type Paths struct {
	PinDir     string `json:"pin_dir"`     // in a bpffs; default DefaultPinDir
	StateDir   string `json:"state_dir"`   // default DefaultStateDir
	CgroupRoot string `json:"cgroup_root"` // default: the root of cgroup v2 as mountinfo names it
}

// PathsFromEnv reads WEIR_PIN_DIR, WEIR_STATE_DIR and WEIR_CGROUP_ROOT.
// Variables that are not set leave their field zero.
func PathsFromEnv(getenv func(string) string) Paths {
	return Paths{
		PinDir:     getenv("WEIR_PIN_DIR"),
		StateDir:   getenv("WEIR_STATE_DIR"),
		CgroupRoot: getenv("WEIR_CGROUP_ROOT"),
	}
}

// Or fills the zero fields of p from fallback.
func (p Paths) Or(fallback Paths) Paths {
	if p.PinDir == "" {
		p.PinDir = fallback.PinDir
	}
	if p.StateDir == "" {
		p.StateDir = fallback.StateDir
	}
	if p.CgroupRoot == "" {
		p.CgroupRoot = fallback.CgroupRoot
	}
	return p
}

func (p Paths) Maps() string       { return filepath.Join(p.PinDir, "maps") }
func (p Paths) Links() string      { return filepath.Join(p.PinDir, "links") }
func (p Paths) Family() string     { return filepath.Join(p.PinDir, "egress", "weir_family") }
func (p Paths) Filters() string    { return filepath.Join(p.PinDir, "filters") }
func (p Paths) Lookups() string    { return filepath.Join(p.PinDir, "lookups") }
func (p Paths) Calls() string      { return filepath.Join(p.PinDir, "calls") }
func (p Paths) Spares() string     { return filepath.Join(p.PinDir, "spares") } // of v0.1.0
func (p Paths) Staging() string    { return p.PinDir + "_new" }                 // bpffs reserves names with dots
func (p Paths) Workloads() string  { return filepath.Join(p.StateDir, "workloads") }
func (p Paths) Lock() string       { return filepath.Join(p.StateDir, "lock") }
func (p Paths) EventsLock() string { return filepath.Join(p.StateDir, "events.lock") }
func (p Paths) Record(key workload.AttachmentID) string {
	return filepath.Join(p.Workloads(), key.String()+".json")
}
func (p Paths) Link(name string) string { return filepath.Join(p.Links(), name) }
func (p Paths) Lookup(cookie uint64) string {
	return filepath.Join(p.Lookups(), fmt.Sprint(cookie))
}

// OpenCgroupRoot opens the directory that the programs are attached to. Without an
// override it must be the real root of cgroup v2: a link on any other cgroup
// misses processes, and silently so once that cgroup dies.
func (p Paths) OpenCgroupRoot() (*os.File, error) {
	path := p.CgroupRoot
	if path == "" {
		var err error
		if path, err = host.CgroupRoot(); err != nil {
			return nil, err
		}
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open cgroup root: %w", err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &fs); err != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return nil, errors.Join(fmt.Errorf("cgroup root %s: not a cgroup v2 directory", path), dir.Close())
	}
	if _, err := os.Stat(filepath.Join(path, "cgroup.type")); err == nil && p.CgroupRoot == "" {
		return nil, errors.Join(fmt.Errorf("cgroup root %s: not the real root of cgroup v2 but that of a cgroup namespace, as in a system container: "+
			"run weir in the host's cgroup namespace, or set cgroup_root = %q (WEIR_CGROUP_ROOT; cgroupRoot in a conflist): "+
			"processes that are moved to a cgroup outside of it are not redirected then, and nothing is once that cgroup is removed: %w",
			path, path, probe.ErrUnsupported), dir.Close())
	}
	return dir, nil
}

// EnsureBPFFS mounts a bpffs at /sys/fs/bpf when the pins are to go there and
// the host has none yet, as systemd does. Any other place is the operator's.
func (p Paths) EnsureBPFFS() error {
	const standard = "/sys/fs/bpf"
	parent := filepath.Dir(p.PinDir)
	var fs unix.Statfs_t
	if err := unix.Statfs(parent, &fs); err == nil && fs.Type == unix.BPF_FS_MAGIC {
		return nil
	}
	if p.PinDir != standard && !strings.HasPrefix(p.PinDir, standard+"/") {
		return fmt.Errorf("use pin directory %s: %s is not in a bpffs, mount one there", p.PinDir, parent)
	}
	if err := unix.Statfs(standard, &fs); err != nil || fs.Type != unix.BPF_FS_MAGIC {
		if err := unix.Mount("bpf", standard, "bpf", 0, "mode=0700"); err != nil {
			return fmt.Errorf("mount bpffs at %s: %w", standard, err)
		}
	}
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return fmt.Errorf("create pin directory: %w", err)
	}
	return nil
}

// Directories are where a change by somebody else can be seen: records, pinned
// maps, links and lookup programs. Not all need exist.
func (p Paths) Directories() []string {
	return []string{p.Workloads(), p.Maps(), p.Links(), p.Lookups(), p.Filters()}
}
