// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// bootSystemd makes a real systemd the first process of a PID namespace, whose cgroups
// are below the one that it starts in. Of units it knows those of a directory alone.
const bootSystemd = `
set -eu
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir /run/systemd
mount -t cgroup2 none /sys/fs/cgroup
exec env -i PATH="$PATH" container=test SYSTEMD_UNIT_PATH="$1" SYSTEMD_LOG_TARGET=console /lib/systemd/systemd --system --unit=nothing.target
`

// systemd is a manager of units of its own on this machine.
type systemd struct {
	t      *testing.T
	cgroup *test.Cgroup
	first  int // its process ID
	log    *os.File
}

func newSystemd(t *testing.T) *systemd {
	t.Helper()
	test.Need(t, test.Root, test.CgroupV2, test.BPF, test.Tool("systemd-run"), test.Tool("unshare"), test.Tool("nsenter"))
	s := &systemd{t: t, cgroup: test.NewCgroup(t)}
	units := t.TempDir()
	test.WriteFile(t, filepath.Join(units, "nothing.target"), "[Unit]\nDefaultDependencies=no\n")
	var err error
	if s.log, err = os.Create(filepath.Join(t.TempDir(), "systemd.log")); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(s.cgroup.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	unshare := exec.Command("unshare", "--mount", "--pid", "--cgroup", "--ipc", "--uts", "--fork", "sh", "-c", bootSystemd, "sh", units)
	unshare.Stdout, unshare.Stderr = s.log, s.log
	unshare.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := unshare.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.end(unshare) })
	test.Eventually(t, func() error {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", unshare.Process.Pid))
		if err == nil {
			_, err = fmt.Sscan(string(children), &s.first)
		}
		if err == nil {
			_, err = os.Stat(fmt.Sprintf("/proc/%d/root/run/systemd/private", s.first))
		}
		return err
	}, "systemd to take calls")
	return s
}

// end ends all that systemd runs, and removes its cgroups.
func (s *systemd) end(unshare *exec.Cmd) {
	if err := os.WriteFile(filepath.Join(s.cgroup.Path, "cgroup.kill"), []byte("1"), 0); err != nil {
		s.t.Error(err)
	}
	_ = unshare.Wait() // it was killed
	var dirs []string
	_ = filepath.WalkDir(s.cgroup.Path, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() && path != s.cgroup.Path {
			dirs = append(dirs, path)
		}
		return nil
	})
	for _, dir := range slices.Backward(dirs) {
		test.Eventually(s.t, func() error { return os.Remove(dir) }, "removal of "+dir)
	}
	if s.t.Failed() {
		text, _ := os.ReadFile(s.log.Name())
		s.t.Logf("systemd:\n%s", text)
	}
	s.log.Close()
}

// scope runs a process in a scope with these properties and returns its cgroup, in which
// more may run.
func (s *systemd) scope(name string, properties ...string) *test.Cgroup {
	s.t.Helper()
	args := []string{"-t", fmt.Sprint(s.first), "-m", "-p", "-C", "systemd-run", "--quiet", "--scope", "--unit=" + name}
	for _, property := range properties {
		args = append(args, "--property="+property)
	}
	run := exec.Command("nsenter", append(args, "sleep", "infinity")...)
	run.Stdout, run.Stderr = s.log, s.log // no pipes: what runs in the scope outlives nsenter
	if err := run.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		_ = run.Process.Kill()
		_ = run.Wait() // it was killed
	})
	path := filepath.Join(s.cgroup.Path, "system.slice", name+".scope")
	var info unix.Stat_t
	test.Eventually(s.t, func() error {
		if err := unix.Stat(path, &info); err != nil {
			return err
		}
		dir, err := os.Open(path)
		if err != nil {
			return err
		}
		defer dir.Close()
		for _, hook := range []ebpf.AttachType{ebpf.AttachCGroupInetIngress, ebpf.AttachCGroupInetEgress} {
			found, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: hook})
			if err != nil {
				return err
			}
			if len(found.Programs) != 1 {
				return fmt.Errorf("%d programs of systemd's at %s of %s", len(found.Programs), hook, path)
			}
		}
		return nil
	}, "systemd's own programs on scope "+name)
	return &test.Cgroup{Path: path, ID: info.Ino}
}

// Tasks and proxy in scopes of a real systemd, with its programs for addresses on them: a
// task that may talk to localhost alone reaches the mesh, and nothing else. Debian builds
// systemd without the programs for SocketBindDeny, so what those do is attached here, in
// the same cgroup by the same flags.
func TestSystemdScopesBesideWeir(t *testing.T) {
	s := newSystemd(t)
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.taskCg = s.scope("task", "IPAddressDeny=any", "IPAddressAllow=localhost")
	a.proxyCg = s.scope("proxy", "IPAddressDeny=any", "IPAddressAllow="+netip.PrefixFrom(a.v4, 24).Masked().String())
	a.startProxy()
	a.works()
	a.identity(inspect.IdentityCgroup, a.proxyCg.ID, false)
	if answer, err := a.ask("udp4", "192.0.2.1:9"); err == nil || !strings.Contains(err.Error(), unix.EPERM.Error()) {
		t.Errorf("a datagram to elsewhere: %+v, %v; want what systemd refuses by", answer, err)
	}

	const refusedPort = 7777
	port := int32(refusedPort>>8 | refusedPort&0xff<<8)
	prog := addrProgram(t, "sd_bind4", ebpf.AttachCGroupInet4Bind, asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, userPort, asm.Word), asm.Mov.Imm(asm.R0, 0), asm.JEq.Imm(asm.R2, port, "out"),
		asm.Mov.Imm(asm.R0, 1), asm.Return().WithSymbol("out"),
	})
	attached, err := link.AttachCgroup(link.CgroupOptions{Path: a.taskCg.Path, Attach: ebpf.AttachCGroupInet4Bind, Program: prog})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { attached.Close() })
	task := a.sockets(taskUID, a.taskCg)
	if _, err := task.listen("refused", fmt.Sprintf("0.0.0.0:%d", refusedPort), 0); err == nil {
		t.Error("a task may listen on the port that its scope forbids")
	}
	task.mustListen("allowed", "0.0.0.0:8080")
	a.works()
	healthy(t, n.Datapath)
}
