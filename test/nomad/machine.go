// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"bufio"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/test"
)

//go:embed init.sh
var initScript string

// The node's addresses on its only network, and those of its neighbour there.
const (
	NodeAddress      = "10.99.0.2"
	NodeAddress6     = "fd00:99::2"
	NeighbourAddress = "10.99.0.1"
)

// machine is the namespaces that a node lives in, from one boot to the next.
type machine struct {
	dir   string   // outlives a reboot
	tools []string // files of this machine that the node has in /opt/tools

	name, address, address6 string
	joined                  *machine // on whose network it is; nil: on one of its own

	net       *test.NetNS
	neighbour *test.NetNS
	boot      *exec.Cmd // its process 1
	hold      io.Closer // closed, also by this process's death: process 1 ends
}

func newMachine(tb testing.TB, tools []string) *machine {
	tb.Helper()
	dir, err := os.MkdirTemp("", "weir-node-")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		tb.Fatalf("make directory of the node: %v", err)
	}
	m := &machine{dir: dir, tools: tools, name: "node", address: NodeAddress, address6: NodeAddress6}
	tb.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			tb.Errorf("remove directory of the node: %v", err)
		}
	})
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755"); err != nil {
		tb.Fatalf("mount the node's disk: %v", err)
	}
	tb.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			tb.Errorf("unmount the node's disk: %v", err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "init.sh"), []byte(initScript), 0o700); err != nil {
		tb.Fatalf("write the node's init: %v", err)
	}
	tb.Cleanup(func() { m.cut(tb) })
	return m
}

// start boots the machine.
func (m *machine) start(tb testing.TB) {
	tb.Helper()
	m.net = test.NewNetNS(tb)
	if m.joined == nil {
		m.neighbour = test.NewNetNS(tb)
		connect(tb, m)
	} else {
		m.neighbour = m.joined.neighbour
		m.joined.bridge(tb, m)
	}
	m.power(tb)
}

// connect gives the machine a network that it shares with a neighbour.
func connect(tb testing.TB, m *machine) {
	tb.Helper()
	test.Veth(tb,
		test.VethEnd{NetNS: m.neighbour, Addrs: prefixes(NeighbourAddress+"/24", "fd00:99::1/64")},
		test.VethEnd{NetNS: m.net, Addrs: prefixes(m.address+"/24", m.address6+"/64"), DefaultRoute: true})
}

func prefixes(addrs ...string) (list []netip.Prefix) {
	for _, addr := range addrs {
		list = append(list, netip.MustParsePrefix(addr))
	}
	return list
}

// power starts process 1.
func (m *machine) power(tb testing.TB) {
	tb.Helper()
	cmd := exec.Command("bash", append([]string{filepath.Join(m.dir, "init.sh"), m.dir, m.name}, m.tools...)...)
	cmd.Env = environment()
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		Setpgid:    true,
	}
	var told strings.Builder
	cmd.Stderr = &told
	hold, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatalf("boot: %v", err)
	}
	ready, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatalf("boot: %v", err)
	}
	m.net.Do(func() { err = cmd.Start() })
	if err != nil {
		tb.Fatalf("boot: %v", err)
	}
	m.boot, m.hold = cmd, hold
	if line, err := bufio.NewReader(ready).ReadString('\n'); line != "ready\n" {
		tb.Fatalf("boot: %v: %s", err, told.String())
	}
}

// cut takes the power away: every process dies at once, and with the last one the
// mounts and the network.
func (m *machine) cut(tb testing.TB) {
	tb.Helper()
	if m.boot == nil {
		return
	}
	if err := m.boot.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		tb.Errorf("cut the node's power: %v", err)
	}
	_ = m.boot.Wait() // process 1 is the last of them to go; it was killed
	_ = m.hold.Close()
	m.boot = nil
	if m.joined != nil {
		m.unplug(tb)
		m.net.End()
	}
}

// command is a program inside the machine; start it by m.run. It has the
// environment of a service.
func (m *machine) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	proc := fmt.Sprintf("/proc/%d/ns/", m.boot.Process.Pid)
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{
		"--mount=" + proc + "mnt", "--net=" + proc + "net", "--uts=" + proc + "uts", "--ipc=" + proc + "ipc", "--", name,
	}, args...)...)
	cmd.Env = environment()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// run starts a command of the machine. Its process ID is that of the program:
// nsenter becomes it, because the namespace of processes is entered before.
func (m *machine) run(cmd *exec.Cmd) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine. A thread may enter a
		// namespace of processes for its children alone, so any will do.
		runtime.LockOSThread()
		pids, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", m.boot.Process.Pid))
		if err != nil {
			done <- err
			return
		}
		defer pids.Close()
		if err := unix.Setns(int(pids.Fd()), unix.CLONE_NEWPID); err != nil {
			done <- fmt.Errorf("enter namespace of processes: %w", err)
			return
		}
		done <- cmd.Start()
	}()
	return <-done
}

// path is where this process sees a file of the machine. Absolute symbolic links
// on the way lead out of it.
func (m *machine) path(name string) string {
	return filepath.Join("/proc", fmt.Sprint(m.boot.Process.Pid), "root", name)
}

// environment is what services of a node have, and nothing of the caller's.
func environment() []string {
	return []string{"PATH=/opt/tools:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"}
}
