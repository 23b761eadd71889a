// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"
)

// A place is where a worker runs.
type place struct {
	netns  string
	uid    uint32
	cgroup string
	cpus   []int // empty: all
}

// A worker is a process of this program that measures: a server or a client.
// It runs until its standard input ends.
type worker struct {
	cmd     *exec.Cmd
	control io.WriteCloser
	answers *json.Decoder
}

// startWorker starts a server (serveSpec), a client (dialSpec) or a holder of
// listeners ([]netip.AddrPort) in its place and waits until it is ready.
func startWorker(ctx context.Context, program string, at place, kind string, spec any) (*worker, error) {
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	cgroup, err := os.Open(at.cgroup)
	if err != nil {
		return nil, err
	}
	defer cgroup.Close()
	w := &worker{cmd: exec.CommandContext(ctx, program, kind, string(text))}
	w.cmd.Env = []string{"GOGC=off", "GOMAXPROCS=8", "GODEBUG=asyncpreemptoff=1"}
	w.cmd.Stderr = os.Stderr
	w.cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential:  &syscall.Credential{Uid: at.uid, Gid: at.uid},
		UseCgroupFD: true,
		CgroupFD:    int(cgroup.Fd()),
	}
	if w.control, err = w.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	answers, err := w.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	w.answers = json.NewDecoder(answers)
	err = inNetNS(at.netns, func() error {
		if err := bindTo(at.cpus); err != nil {
			return err
		}
		return w.cmd.Start()
	})
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", kind, err)
	}
	var ready json.RawMessage
	if err := w.read(&ready); err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", kind, err), w.stop())
	}
	return w, nil
}

// bindTo binds the calling thread, and what it starts, to some CPUs.
func bindTo(cpus []int) error {
	if len(cpus) == 0 {
		return nil
	}
	var set unix.CPUSet
	for _, cpu := range cpus {
		set.Set(cpu)
	}
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("bind to CPUs %v: %w", cpus, err)
	}
	return nil
}

// ask lets the worker go on and waits for its report.
func (w *worker) ask(report any) error {
	if _, err := w.control.Write([]byte{'\n'}); err != nil {
		return fmt.Errorf("ask worker: %w", err)
	}
	return w.read(report)
}

func (w *worker) read(report any) error {
	if err := w.answers.Decode(report); err != nil {
		return fmt.Errorf("read worker's report: %w", err)
	}
	return nil
}

// stop ends the worker. A worker that does not know how to end is killed by
// its context.
func (w *worker) stop() error {
	return errors.Join(w.control.Close(), w.cmd.Wait())
}

// runWorker is the other side: the worker's own main.
func runWorker(kind, text string) error {
	debug.SetGCPercent(-1)
	switch kind {
	case "serve":
		var spec serveSpec
		if err := json.Unmarshal([]byte(text), &spec); err != nil {
			return err
		}
		return serve(spec, int(os.Stdin.Fd()), os.Stdout)
	case "dial":
		var spec dialSpec
		if err := json.Unmarshal([]byte(text), &spec); err != nil {
			return err
		}
		return dial(spec, os.Stdin, os.Stdout)
	case "hold":
		var spec []netip.AddrPort
		if err := json.Unmarshal([]byte(text), &spec); err != nil {
			return err
		}
		return hold(spec, os.Stdin, os.Stdout)
	}
	return fmt.Errorf("worker %q: want serve, dial or hold", kind)
}

// hold listens and costs nothing more until control ends: of these there are
// hundreds at a time.
func hold(addrs []netip.AddrPort, control io.Reader, out io.Writer) error {
	for _, addr := range addrs {
		if _, err := listen(addr); err != nil {
			return err
		}
	}
	if err := json.NewEncoder(out).Encode(addrs); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, control)
	return err
}

// cpuList is the CPUs that this process may use.
func cpuList() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("get CPUs: %w", err)
	}
	var cpus []int
	for cpu := range len(set) * 64 {
		if set.IsSet(cpu) {
			cpus = append(cpus, cpu)
		}
	}
	return cpus, nil
}
