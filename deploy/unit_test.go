// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"errors"
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
)

// bootSystemd starts systemd as the first process of a node whose disk is a
// layer over this machine's, with Weir installed by itself. The cgroups are the
// machine's: programs are attached to their root.
const bootSystemd = `
set -eu
disk=$1 bin=$2
mount --make-rprivate /
mount -t tmpfs tmpfs "$disk"
mkdir "$disk/upper" "$disk/work" "$disk/root"
mount -t overlay -o "lowerdir=/,upperdir=$disk/upper,workdir=$disk/work" overlay "$disk/root"
cd "$disk/root"
rm -rf etc/systemd/system/*.wants etc/weir.d var/lib/weir
mkdir -p opt/cni usr/local/bin
mount --rbind "$bin" opt/cni
opt/cni/weir install -root "$PWD" -cni-path '' -cni-config-dir '' -plugin opt/cni/weir-cni
umount opt/cni
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /sys/fs/cgroup sys/fs/cgroup
mount -t bpf bpf sys/fs/bpf
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mount --rbind /dev dev
exec chroot . /usr/bin/env -i container=test SYSTEMD_LOG_TARGET=console /lib/systemd/systemd --unit=weir-agent.service
`

// The unit takes most privileges from the agent: that it comes up, mends, and
// comes back, is only shown by systemd itself.
func TestUnitUnderSystemd(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF, test.Tool("go"), test.Tool("systemctl"), test.Tool("unshare"), test.Tool("nsenter"))
	bin := t.TempDir()
	build := exec.Command("go", "build", "-o", bin+"/", "../cmd/weir", "../cmd/weir-cni")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	log, err := os.Create(filepath.Join(t.TempDir(), "systemd.log"))
	if err != nil {
		t.Fatal(err)
	}
	machine := exec.Command("unshare", "--mount", "--pid", "--kill-child", "--fork", "--net", "--ipc", "--uts", "sh", "-c", bootSystemd, "sh", t.TempDir(), bin)
	machine.Stdout, machine.Stderr = log, log
	machine.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := machine.Start(); err != nil {
		t.Fatal(err)
	}
	var first string // process ID of systemd
	cgroups := cgroupsAtRoot(t)
	t.Cleanup(func() {
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("systemd:\n%s", text)
		}
		if first != "" {
			if t.Failed() {
				out, _ := exec.Command("nsenter", "-t", first, "-m", "-p", "-r", "journalctl", "--no-pager", "-u", unitName).CombinedOutput()
				t.Logf("agent:\n%s", out)
			}
			_ = exec.Command("nsenter", "-t", first, "-m", "-p", "-r", "systemctl", "stop", unitName).Run()
		}
		_ = machine.Process.Kill()
		_ = machine.Wait()
		if first != "" { // with it ends every process of its namespace
			test.Eventually(t, func() error {
				if _, err := os.Stat("/proc/" + first); err == nil {
					return errors.New("it is there")
				}
				return nil
			}, "the end of systemd")
		}
		for _, dir := range cgroupsAtRoot(t) {
			if !slices.Contains(cgroups, dir) {
				removeCgroups(dir)
			}
		}
	})
	inside := func(args ...string) (string, error) {
		out, err := exec.Command("nsenter", append([]string{"-t", first, "-m", "-p", "-n", "-r"}, args...)...).CombinedOutput()
		return strings.TrimSpace(string(out)), err
	}
	active := func() bool {
		state, _ := inside("systemctl", "is-active", unitName)
		return state == "active"
	}
	wait := func(what string, condition func() bool) {
		t.Helper()
		test.Eventually(t, func() error {
			if !condition() {
				return errors.New("not yet")
			}
			return nil
		}, what)
	}

	wait("systemd", func() bool {
		children, err := os.ReadFile("/proc/" + strconv.Itoa(machine.Process.Pid) + "/task/" + strconv.Itoa(machine.Process.Pid) + "/children")
		if fields := strings.Fields(string(children)); err == nil && len(fields) == 1 {
			first = fields[0]
		}
		name, err := os.ReadFile("/proc/" + first + "/comm")
		return first != "" && err == nil && strings.TrimSpace(string(name)) == "systemd"
	})
	wait("the agent says that it is ready", active)
	if out, err := inside("weir", "status"); err != nil {
		t.Errorf("weir status: %v\n%s", err, out)
	}
	const pin = "/sys/fs/bpf/weir/links/weir_connect4"
	if out, err := inside("rm", pin); err != nil {
		t.Fatalf("remove pin: %v\n%s", err, out)
	}
	wait("a removed pin is put back", func() bool { _, err := inside("test", "-e", pin); return err == nil })
	before, err := inside("systemctl", "show", "-P", "MainPID", unitName)
	if err != nil {
		t.Fatal(before, err)
	}
	if out, err := inside("systemctl", "kill", "--kill-whom=main", "-s", "KILL", unitName); err != nil {
		t.Fatalf("kill the agent: %v\n%s", err, out)
	}
	wait("a killed agent is back", func() bool {
		now, _ := inside("systemctl", "show", "-P", "MainPID", unitName)
		return now != before && now != "0" && active()
	})
	if out, err := inside("weir", "status"); err != nil {
		t.Errorf("weir status after the restart: %v\n%s", err, out)
	}
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
