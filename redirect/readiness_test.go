// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/probe"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// resultsOf are the results of the checks of one code.
func resultsOf(checks []health.Check, code string) (list []health.Result) {
	for _, check := range checks {
		if check.Code == code {
			list = append(list, check.Result)
		}
	}
	return list
}

// Whether the egress guard sees sockets of every family is told as the kernel has it.
func TestReadinessOfSocketFamilies(t *testing.T) {
	test.Need(t, test.Root, test.BPF)
	want := health.ResultOK
	if err := probe.Families(); err != nil {
		want = health.ResultWarning
	}
	if got := resultsOf(inspect.KernelReadiness("/"), "socket-families"); !slices.Equal(got, []health.Result{want}) {
		t.Errorf("results %v, want %s", got, want)
	}
}

// What a node has at the hooks and on its file systems is the same before and
// after, whether Weir is loaded or not.
func TestReadinessChangesNothing(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	pins, state := test.BPFFS(t), t.TempDir()
	d := New(store.Paths{PinDir: filepath.Join(pins, "weir"), StateDir: filepath.Join(state, "state"), CgroupRoot: test.NewCgroup(t).Path})
	t.Cleanup(func() {
		if _, err := d.Unload(); err != nil {
			t.Errorf("unload: %v", err)
		}
	})
	seen := func() (list []string) {
		root, err := d.Paths().OpenCgroupRoot()
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		for _, h := range program.Hooks() {
			programs, err := program.AttachedTo(root, h.Attach)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range programs {
				list = append(list, fmt.Sprintf("%s: program %d", h.Attach, p.ID))
			}
		}
		for _, dir := range []string{pins, state} {
			err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
				if err != nil {
					return err
				}
				var stat unix.Stat_t
				err = unix.Lstat(path, &stat)
				list = append(list, fmt.Sprintf("%s: inode %d, mode %o, size %d, changed %v", path, stat.Ino, stat.Mode, stat.Size, stat.Ctim))
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		return list
	}
	for _, loaded := range []bool{false, true} {
		if loaded {
			if _, err := d.Load(); err != nil {
				t.Fatal(err)
			}
		}
		before := seen()
		checks := d.Readiness()
		if diff := cmp.Diff(before, seen()); diff != "" {
			t.Errorf("loaded %t: the node (-before +after):\n%s", loaded, diff)
		}
		for _, check := range checks {
			if check.Result == health.ResultFault {
				t.Errorf("loaded %t: %+v", loaded, check)
			}
		}
		if got := resultsOf(checks, "kernel-feature"); len(got) != len(probe.Requirements()) {
			t.Errorf("loaded %t: %d features were asked for, want %d", loaded, len(got), len(probe.Requirements()))
		}
	}
}

// A kernel, as the files below a root show it, and what is said of it.
func TestReadinessOfTheKernel(t *testing.T) {
	write := func(root, path, text string) {
		t.Helper()
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	good := func(root string) {
		write(root, "sys/kernel/btf/vmlinux", "btf")
		write(root, "sys/kernel/security/lockdown", "[none] integrity confidentiality\n")
		write(root, "proc/sys/net/core/bpf_jit_enable", "1\n")
		write(root, "proc/sys/net/ipv4/ip_forward", "1\n")
		write(root, "proc/sys/kernel/unprivileged_bpf_disabled", "2\n")
	}
	for _, c := range []struct {
		name, path, text string // a file of a good kernel that is another one; empty text: not there
		code             string
		want             health.Result
		says             string
	}{
		{"a good kernel", "proc/sys/net/core/bpf_jit_enable", "1", "bpf-jit", health.ResultOK, "compiled"},
		{"no BTF", "sys/kernel/btf/vmlinux", "", "kernel-btf", health.ResultFault, "has no BTF"},
		{"locked down", "sys/kernel/security/lockdown", "none integrity [confidentiality]\n", "kernel-lockdown", health.ResultOK, "for confidentiality"},
		{"no lockdown", "sys/kernel/security/lockdown", "", "kernel-lockdown", health.ResultOK, "not locked down"},
		{"an interpreter", "proc/sys/net/core/bpf_jit_enable", "0\n", "bpf-jit", health.ResultFault, "does not compile"},
		{"always compiled", "proc/sys/net/core/bpf_jit_enable", "", "bpf-jit", health.ResultOK, "always"},
		{"no forwarding", "proc/sys/net/ipv4/ip_forward", "0\n", "ip-forward", health.ResultWarning, `"0"`},
		{"bpf for all", "proc/sys/kernel/unprivileged_bpf_disabled", "0\n", "unprivileged-bpf", health.ResultOK, "is 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			good(root)
			if c.text == "" {
				remove(t, filepath.Join(root, c.path))
			} else {
				write(root, c.path, c.text)
			}
			for _, check := range inspect.KernelReadiness(root) {
				switch {
				case check.Code == c.code:
					if check.Result != c.want || !strings.Contains(check.What, c.says) || (check.Remedy == "") != (c.want == health.ResultOK) {
						t.Errorf("check = %+v, want %s that says %q", check, c.want, c.says)
					}
				case check.Code != "kernel-feature" && check.Code != "socket-families" && check.Result != health.ResultOK:
					t.Errorf("%+v, want ok", check)
				}
			}
		})
	}
}

func TestReadinessNamesEachFeature(t *testing.T) {
	c := &health.Checks{Group: "kernel"}
	inspect.CheckRequirements(c, []probe.Requirement{
		{What: "helper one", Why: "to do one thing", Since: "5.7", ProbeFor: func() error { return fmt.Errorf("ask: %w", ebpf.ErrNotSupported) }},
		{What: "helper two", Why: "to do two things", Since: "5.8", ProbeFor: func() error { return nil }},
		{What: "helper three", Why: "to do three things", Since: "5.9", ProbeFor: func() error { return unix.EPERM }},
	})
	var got []string
	for _, check := range c.List {
		got = append(got, string(check.Result)+" "+check.What)
	}
	want := []string{
		"fault the kernel lacks helper one, needed to do one thing (Linux 5.7)",
		"ok helper two, needed to do two things",
		"fault the kernel cannot be asked for helper three: operation not permitted",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("checks (-want +got):\n%s", diff)
	}
}

// Programs of others: one that decides connections is a warning, another Weir is none.
func TestReadinessJudgesProgramsOfOthers(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	first := attachNeighbour(t)
	n, another := newNode(t), newDatapath(t)
	info, err := first.link.Info()
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]health.Check)
	for _, check := range n.HookReadiness() {
		found[check.What] = check
	}
	what := fmt.Sprintf("program neighbour (ID %d) at CGroupInet4Connect, which runs before Weir's, loaded by UID 0 may refuse a connection or datagram, or send it elsewhere", info.Program)
	if check := found[what]; check.Result != health.ResultWarning || check.Code != "other-program" || check.Remedy == "" {
		t.Errorf("no warning %q among %+v", what, found)
	}
	id := linkIDs(t, another.Paths().Link("weir_connect4"))[1]
	what = fmt.Sprintf("program weir_connect4 (ID %d) at CGroupInet4Connect, which runs after Weir's, pinned at %s is of another instance of Weir and serves its own namespaces",
		id, another.Paths().Link("weir_connect4"))
	if check := found[what]; check.Result != health.ResultOK {
		t.Errorf("no check %q that is ok among %+v", what, found)
	}
	// Where none is, that is said.
	alone := New(store.Paths{PinDir: n.Paths().PinDir, StateDir: n.Paths().StateDir, CgroupRoot: test.NewCgroup(t).Path})
	if got := resultsOf(alone.HookReadiness(), "other-program"); !cmp.Equal(got, []health.Result{health.ResultOK}) {
		t.Errorf("a cgroup without programs: %v, want one that is ok", got)
	}
}

func TestReadinessOfMounts(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	pins := test.BPFFS(t)
	for _, c := range []struct {
		name  string
		paths store.Paths
		want  map[string]health.Result
	}{
		{"as it should be", store.Paths{PinDir: filepath.Join(pins, "weir")}, map[string]health.Result{"cgroup-root": health.ResultOK, "bpffs": health.ResultOK}},
		{"pins on a disk", store.Paths{PinDir: filepath.Join(t.TempDir(), "weir")}, map[string]health.Result{"cgroup-root": health.ResultOK, "bpffs": health.ResultFault}},
		{"no cgroup v2", store.Paths{PinDir: filepath.Join(pins, "weir"), CgroupRoot: t.TempDir()}, map[string]health.Result{"cgroup-root": health.ResultFault, "bpffs": health.ResultOK}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := make(map[string]health.Result)
			for _, check := range New(c.paths).MountReadiness() {
				got[check.Code] = check.Result
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("checks (-want +got):\n%s", diff)
			}
		})
	}
	if err := unix.Mount("", pins, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if got := resultsOf(New(store.Paths{PinDir: filepath.Join(pins, "weir")}).MountReadiness(), "bpffs"); !cmp.Equal(got, []health.Result{health.ResultFault}) {
		t.Errorf("a bpffs that is read-only: %v, want a fault", got)
	}
}
