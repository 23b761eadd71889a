// SPDX-License-Identifier: MPL-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// portName is the virtio port on which the guest speaks; the console is the kernel's.
const portName = "weir"

// job is what the host asks of the guest; it lies at jobPath in the initramfs.
type job struct {
	Modules []string // below /modules, in load order
	Runs    []guestRun
	Env     []string
	Shell   bool
}

const jobPath = "/job.json"

// guestRun is one test binary.
type guestRun struct {
	Package string
	Dir     string
	Command []string
	Env     []string
}

// message is one line from the guest.
type message struct {
	Ready   string     `json:",omitempty"` // uname -r, when the tests can start
	Package string     `json:",omitempty"`
	Output  []byte     `json:",omitempty"`
	Exit    *guestExit `json:",omitempty"` // of Package
	Error   string     `json:",omitempty"` // of the guest itself
	Done    bool       `json:",omitempty"`
}

// guestExit is the end of a test binary.
type guestExit struct {
	Status int
	Took   time.Duration
}

// guest is /init. The process with ID 1 reaps what the tests leave; the work is done by its child.
func guest() {
	if os.Getpid() == 1 {
		if err := firstProcess(); err != nil {
			fmt.Fprintln(os.Stderr, "init:", err)
		}
		unix.Sync()
		fmt.Fprintln(os.Stderr, "init: power off:", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
		return
	}
	if err := guestWork(); err != nil {
		fmt.Fprintln(os.Stderr, "init:", err)
		os.Exit(1)
	}
}

func firstProcess() error {
	if err := mountAll(); err != nil {
		return err
	}
	console, err := os.OpenFile("/dev/console", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	pid, err := syscall.ForkExec("/init", []string{"init"}, &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=/src/bin:/usr/local/bin:/usr/sbin:/usr/bin", "HOME=/root", "TMPDIR=/tmp", "TERM=vt100"},
		Files: []uintptr{console.Fd(), console.Fd(), console.Fd()},
	})
	if err != nil {
		return err
	}
	for {
		var status unix.WaitStatus
		child, err := unix.Wait4(-1, &status, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("wait for children: %w", err)
		}
		if child == pid {
			return nil
		}
	}
}

func mountAll() error {
	mounts := []struct {
		source, target, kind, data string
		flags                      uintptr
	}{
		{"proc", "/proc", "proc", "", 0},
		{"sysfs", "/sys", "sysfs", "", 0},
		{"devtmpfs", "/dev", "devtmpfs", "mode=755", 0},
		{"devpts", "/dev/pts", "devpts", "", 0},
		{"tmpfs", "/dev/shm", "tmpfs", "mode=1777", 0},
		{"tmpfs", "/tmp", "tmpfs", "mode=1777", 0},
		{"tmpfs", "/run", "tmpfs", "mode=755", 0},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", "nsdelegate", 0},
		{"bpf", "/sys/fs/bpf", "bpf", "mode=700", 0},
		{"tracefs", "/sys/kernel/tracing", "tracefs", "", 0},
	}
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

// guestWork sets the machine up, runs the job and reports.
func guestWork() error {
	text, err := os.ReadFile(jobPath)
	if err != nil {
		return err
	}
	var j job
	if err := json.Unmarshal(text, &j); err != nil {
		return fmt.Errorf("read job: %w", err)
	}
	for _, name := range j.Modules {
		if err := loadModule(filepath.Join("/modules", name+".ko")); err != nil {
			return fmt.Errorf("load module %s: %w", name, err)
		}
	}
	if out, err := exec.Command("/usr/bin/busybox", "ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("set lo up: %w: %s", err, out)
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
		return err
	}
	if j.Shell {
		return guestShell(j)
	}
	port, err := openPort()
	if err != nil {
		return err
	}
	defer port.Close()
	say := json.NewEncoder(port)
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return err
	}
	if err := say.Encode(message{Ready: unix.ByteSliceToString(name.Release[:])}); err != nil {
		return err
	}
	for _, r := range j.Runs {
		if err := runInGuest(say, r, j.Env); err != nil {
			return errors.Join(err, say.Encode(message{Error: err.Error()}))
		}
	}
	return say.Encode(message{Done: true})
}

// guestShell gives the console to a person. What the job would have run is in /job.json.
func guestShell(j job) error {
	fmt.Println("A shell in the guest; Ctrl-D powers it off. The tests:")
	for _, r := range j.Runs {
		fmt.Printf("  cd %s && %s\n", r.Dir, strings.Join(append(append([]string{}, r.Env...), r.Command...), " "))
	}
	cmd := exec.Command("/usr/bin/busybox", "setsid", "cttyhack", "sh", "-l")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), j.Env...)
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		return err
	}
	return nil
}

func loadModule(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := unix.FinitModule(int(file.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// openPort finds the port by its name; it appears a moment after its driver.
func openPort() (*os.File, error) {
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); <-again.C {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, file := range names {
			if text, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(text)) == portName {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(file)), os.O_WRONLY, 0)
			}
		}
	}
	return nil, errors.New("find virtio port: none in 20 seconds")
}

// portWriter sends what a test binary prints.
type portWriter struct {
	say  *json.Encoder
	name string
}

func (w portWriter) Write(p []byte) (int, error) {
	return len(p), w.say.Encode(message{Package: w.name, Output: p})
}

var _ io.Writer = portWriter{}

func runInGuest(say *json.Encoder, r guestRun, env []string) error {
	cmd := exec.Command(r.Command[0], r.Command[1:]...)
	cmd.Dir = r.Dir
	cmd.Env = append(append(os.Environ(), env...), r.Env...)
	out := portWriter{say, r.Package}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = 5 * time.Second // a process that a test left may hold the pipe
	start := time.Now()
	err := cmd.Run()
	if cmd.ProcessState == nil {
		return fmt.Errorf("run %s: %w", r.Command[0], err)
	}
	exit := guestExit{Status: cmd.ProcessState.ExitCode(), Took: time.Since(start)}
	if errors.Is(err, exec.ErrWaitDelay) {
		exit.Status = 1
		fmt.Fprintf(out, "%s left a process that holds its output\n", r.Package)
	}
	return say.Encode(message{Package: r.Package, Exit: &exit})
}
