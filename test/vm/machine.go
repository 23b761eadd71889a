// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// machine is how a guest of one architecture is run.
type machine struct {
	qemu    string
	pkg     string
	args    []string
	console string
}

var machines = map[string]machine{
	"amd64": {"qemu-system-x86_64", "qemu-system-x86", []string{"-machine", "q35"}, "ttyS0"},
	"arm64": {"qemu-system-aarch64", "qemu-system-arm", []string{"-machine", "virt,gic-version=3"}, "ttyAMA0"},
}

// guestBoot is one start of a guest.
type guestBoot struct {
	arch, accel     string
	kernel, initrd  string
	log             string // console
	shell           bool
	timeout, booted time.Duration // of all, and until the guest is ready
}

// transcript is what a guest said.
type transcript struct {
	release string
	output  map[string]*bytes.Buffer
	exit    map[string]*guestExit
	done    bool
	took    time.Duration
}

var (
	errNotReady = errors.New("the guest did not get ready")
	errTimeout  = errors.New("the guest did not finish")
	errDied     = errors.New("the guest died before its tests were done")
)

func (b guestBoot) command(ctx context.Context) *exec.Cmd {
	m := machines[b.arch]
	args := append([]string{}, m.args...)
	switch {
	case b.accel == "kvm":
		args = append(args, "-accel", "kvm", "-cpu", "host")
	case b.arch == "arm64":
		args = append(args, "-accel", "tcg,thread=multi", "-cpu", "cortex-a72")
	default:
		args = append(args, "-accel", "tcg,thread=multi", "-cpu", "max,la57=off")
	}
	line := "console=" + m.console + " panic=-1 random.trust_cpu=on"
	if b.shell {
		args = append(args, "-serial", "mon:stdio", "-chardev", "null,id=port")
		line += " quiet"
	} else {
		args = append(args, "-serial", "file:"+b.log, "-chardev", "stdio,id=port,signal=off", "-monitor", "none")
	}
	args = append(args, "-smp", "2", "-m", "2048", "-display", "none", "-no-reboot", "-nodefaults", "-no-user-config",
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port,name="+portName,
		"-kernel", b.kernel, "-initrd", b.initrd, "-append", line)
	return exec.CommandContext(ctx, m.qemu, args...)
}

// run boots the guest and listens until it powers itself off or the time is over.
func (b guestBoot) run(ctx context.Context, hear func(message)) (transcript, error) {
	start := time.Now()
	t := transcript{output: map[string]*bytes.Buffer{}, exit: map[string]*guestExit{}}
	ctx, cancel := context.WithTimeoutCause(ctx, b.timeout, errTimeout)
	defer cancel()
	ctx, late := context.WithCancelCause(ctx)
	defer late(nil)
	watch := time.AfterFunc(b.booted, func() { late(errNotReady) })
	defer watch.Stop()

	cmd := b.command(ctx)
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	input, err := cmd.StdinPipe() // stays open: the end of input would end the port
	if err != nil {
		return t, err
	}
	defer input.Close()
	output, err := cmd.StdoutPipe()
	if err != nil {
		return t, err
	}
	if err := cmd.Start(); err != nil {
		return t, fmt.Errorf("start guest: %w", err)
	}
	var failure error
	for lines := json.NewDecoder(output); ; {
		var m message
		if err := lines.Decode(&m); err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrClosed) && ctx.Err() == nil {
				failure = fmt.Errorf("read from guest: %w", err)
				late(failure)
			}
			break
		}
		if m.Ready != "" {
			watch.Stop()
		}
		t.hear(m)
		hear(m)
		if m.Error != "" {
			failure = errors.New(m.Error)
		}
	}
	err = cmd.Wait()
	t.took = time.Since(start)
	switch {
	case ctx.Err() != nil:
		return t, context.Cause(ctx)
	case failure != nil:
		return t, failure
	case err != nil:
		return t, fmt.Errorf("run guest: %w: %s", err, strings.TrimSpace(complaint.String()))
	case !t.done:
		return t, errDied
	}
	return t, nil
}

func (t *transcript) hear(m message) {
	if m.Ready != "" {
		t.release = m.Ready
	}
	if m.Package != "" && t.output[m.Package] == nil {
		t.output[m.Package] = &bytes.Buffer{}
	}
	if len(m.Output) > 0 {
		t.output[m.Package].Write(m.Output)
	}
	if m.Exit != nil {
		t.exit[m.Package] = m.Exit
	}
	t.done = t.done || m.Done
}

// splat matches what a kernel prints when it is hurt.
var splat = regexp.MustCompile(`(?m)^.*(Oops|kernel BUG at|BUG: |WARNING: CPU|WARNING: \S+ at |general protection fault|Kernel panic|unregister_netdevice: waiting).*$`)

// kernelComplaints finds them in a console log.
func kernelComplaints(log string) ([]string, error) {
	text, err := os.ReadFile(log)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(splat.FindAllString(string(text), -1), func(line string) bool {
		// Those of the clock and the scheduler are an emulated processor's that had to wait.
		return strings.Contains(line, "soft lockup") || strings.Contains(line, "kernel/time/") || strings.Contains(line, "kernel/sched/")
	}), nil
}

// accelerator says whether guests run on KVM here. That is tried, not read: a /dev/kvm may be there
// and still run no ordinary kernel. The answer holds for one boot of this machine and is kept in dir.
func accelerator(ctx context.Context, dir, arch, kernel, initrd string, note func(string, ...any)) (string, error) {
	device, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return "tcg", nil
	}
	device.Close()
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	kept := filepath.Join(dir, "accelerator")
	if text, err := os.ReadFile(kept); err == nil {
		if answer, ok := strings.CutPrefix(string(text), string(boot)); ok {
			return answer, nil
		}
	}
	answer := "kvm"
	b := guestBoot{arch: arch, accel: "kvm", kernel: kernel, initrd: initrd, log: filepath.Join(dir, "kvm.log"),
		timeout: 20 * time.Second, booted: 20 * time.Second}
	if _, err := b.run(ctx, func(message) {}); err != nil {
		note("KVM is here but runs no Debian kernel (%v): using TCG", err)
		answer = "tcg"
	}
	return answer, os.WriteFile(kept, append(boot, answer...), 0o644)
}
