// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/spawn"
)

// bootSystemd starts systemd as the first process of a node whose disk is a
// layer over this machine's, with Weir installed by itself. The cgroups are the
// machine's: programs are attached to their root. Mounts propagate, as systemd
// has it where it is not in a container.
const bootSystemd = `
set -eu
disk=$1 bin=$2
mount --make-rprivate /
mount -t tmpfs tmpfs "$disk"
mkdir "$disk/upper" "$disk/work" "$disk/root"
mount -t overlay -o "lowerdir=/,upperdir=$disk/upper,workdir=$disk/work" overlay "$disk/root"
cd "$disk/root"
rm -rf etc/systemd/system/*.wants etc/weir.d var/lib/weir var/lib/cni
mkdir -p opt/cni usr/local/bin var/lib/cni/results
mount --bind "$bin" opt/cni
opt/cni/weir install -root "$PWD" -cni-path '' -cni-config-dir '' -plugin opt/cni/weir-cni
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /sys/fs/cgroup sys/fs/cgroup
mount -t bpf bpf sys/fs/bpf
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mount --rbind /dev dev
mount --make-rshared .
exec chroot . /usr/bin/env -i container=test SYSTEMD_LOG_TARGET=console /lib/systemd/systemd --unit=weir-agent.service
`

// machine is a node whose first process is a real systemd. It has no network but lo.
type machine struct {
	net   *test.NetNS
	first int    // process ID of systemd
	root  string // its disk, as the test sees it
}

// bootMachine returns once systemd runs; Weir's agent is on its way then.
func bootMachine(t *testing.T) *machine {
	t.Helper()
	test.Need(t, test.Root, test.CgroupV2, test.BPF, test.Tool("go"), test.Tool("systemctl"), test.Tool("unshare"), test.Tool("nsenter"))
	bin := filepath.Dir(built(t).CLI)
	log, err := os.Create(filepath.Join(t.TempDir(), "systemd.log"))
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{net: test.NewNetNS(t)}
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		t.Fatal(err)
	}
	cgroups := cgroupsAtRoot(t)
	shell, err := spawn.Start(spawn.Spec{
		Binary: unshare, NetNS: m.net.Path, Stdout: log, Stderr: log,
		Args: []string{"--mount", "--pid", "--kill-child", "--fork", "--ipc", "--uts", "sh", "-c", bootSystemd, "sh", t.TempDir(), bin},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("systemd:\n%s", text)
		}
		if m.first != 0 {
			if t.Failed() {
				out, _ := m.run("journalctl", "--no-pager", "-u", unitName)
				t.Logf("agent:\n%s", out)
			}
			_, _ = m.run("systemctl", "stop", unitName)
		}
		if err := shell.Stop(0); err != nil {
			t.Error(err)
		}
		if m.first != 0 { // with it ends every process of its namespace
			wait(t, "the end of systemd", func() bool { return hasEnded(m.first) })
		}
		for _, dir := range cgroupsAtRoot(t) {
			if !slices.Contains(cgroups, dir) {
				removeCgroups(dir)
			}
		}
	})
	wait(t, "systemd", func() bool {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", shell.PID()))
		if _, scan := fmt.Sscan(string(children), &m.first); err != nil || scan != nil {
			return false
		}
		m.root = fmt.Sprintf("/proc/%d/root", m.first)
		name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", m.first))
		return err == nil && strings.TrimSpace(string(name)) == "systemd"
	})
	return m
}

// run runs a program on the node.
func (m *machine) run(args ...string) (string, error) {
	out, err := exec.Command("nsenter", append([]string{"-t", strconv.Itoa(m.first), "-m", "-p", "-n", "-r"}, args...)...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// must runs a program on the node that has to succeed.
func (m *machine) must(t *testing.T, args ...string) string {
	t.Helper()
	out, err := m.run(args...)
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// active reports whether the agent has said that it is ready.
func (m *machine) active() bool {
	state, _ := m.run("systemctl", "is-active", unitName)
	return state == "active"
}

// hasEnded reports whether a process is gone, or a zombie: it is nobody's child but
// that of the machine's first process, which in many a container waits for none.
func hasEnded(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, state, _ := strings.Cut(string(stat), ") ") // the name before it may have anything in it but this
	return strings.HasPrefix(state, "Z")
}

func wait(t *testing.T, what string, condition func() bool) {
	t.Helper()
	test.Eventually(t, func() error {
		if !condition() {
			return errors.New("not yet")
		}
		return nil
	}, what)
}

// cgroupsAtRoot lists what systemd may make at the root of each hierarchy.
func cgroupsAtRoot(t *testing.T) (dirs []string) {
	t.Helper()
	for _, pattern := range []string{"/sys/fs/cgroup/*", "/sys/fs/cgroup/*/*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, dir := range found {
			if slices.Contains([]string{".slice", ".scope", ".mount"}, filepath.Ext(dir)) {
				dirs = append(dirs, dir)
			}
		}
	}
	return dirs
}

// removeCgroups removes what systemd made; what is in use stays.
func removeCgroups(root string) {
	var dirs []string
	_ = filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	slices.Reverse(dirs)
	for _, dir := range dirs {
		_ = syscall.Rmdir(dir)
	}
}
