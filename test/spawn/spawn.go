// SPDX-License-Identifier: MPL-2.0

// Package spawn starts programs where an allocation's programs run: in a
// given network namespace, in a given cgroup, under a given UID. It knows the
// kernel and nothing of the project, and it does not import testing, so that
// programs can use it too.
package spawn

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Spec says what to run and where.
type Spec struct {
	// Binary is the path of the program. Only the caller needs access to it:
	// the program is executed by descriptor, so it may lie in a directory
	// that UID cannot enter. Scripts cannot be started this way.
	Binary string
	Args   []string // without the program's name
	Env    []string // the caller's own where nil
	Dir    string   // working directory; "/" where empty
	NetNS  string   // path of the network namespace; the caller's where empty
	Cgroup string   // directory of a cgroup-v2 group; the caller's where empty
	UID    uint32   // also the GID
	Stdout io.Writer
	Stderr io.Writer
}

// Process is a program that Start started. It is killed when the process that
// started it dies, however that happens.
type Process struct {
	name string
	pid  int
	done chan struct{}
	err  error // valid once done is closed
}

// Start starts the program and returns once it runs.
func Start(spec Spec) (*Process, error) {
	binary, err := os.Open(spec.Binary)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Binary, err)
	}
	defer binary.Close()
	cmd := &exec.Cmd{
		Path:       "/proc/self/fd/3",
		Args:       append([]string{spec.Binary}, spec.Args...),
		Env:        spec.Env,
		Dir:        spec.Dir,
		Stdout:     spec.Stdout,
		Stderr:     spec.Stderr,
		ExtraFiles: []*os.File{binary}, // descriptor 3 of the child
		SysProcAttr: &syscall.SysProcAttr{
			Credential: &syscall.Credential{Uid: spec.UID, Gid: spec.UID},
			Pdeathsig:  syscall.SIGKILL,
			Setpgid:    true, // an interrupt at the terminal is the caller's to handle
		},
	}
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	if spec.Cgroup != "" {
		group, err := os.Open(spec.Cgroup)
		if err != nil {
			return nil, fmt.Errorf("start %s: open cgroup: %w", spec.Binary, err)
		}
		defer group.Close()
		cmd.SysProcAttr.UseCgroupFD = true
		cmd.SysProcAttr.CgroupFD = int(group.Fd())
	}

	p := &Process{name: spec.Binary, done: make(chan struct{})}
	started := make(chan error, 1)
	onOwnThread(func() {
		// The thread outlives the child: the kernel sends the parent-death
		// signal when the thread dies.
		defer close(p.done)
		if err := enter(spec.NetNS); err != nil {
			started <- err
			return
		}
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		p.pid = cmd.Process.Pid
		started <- nil
		p.err = cmd.Wait()
	})
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Binary, err)
	}
	return p, nil
}

// Run starts the program, waits for its end and returns what it wrote to
// standard output. An error carries what it wrote to standard error.
func Run(spec Spec) (string, error) {
	var stdout, stderr strings.Builder
	spec.Stdout, spec.Stderr = &stdout, &stderr
	p, err := Start(spec)
	if err != nil {
		return "", err
	}
	if err := p.Wait(); err != nil {
		return stdout.String(), fmt.Errorf("run %s: %w: %s", spec.Binary, err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// PID is the program's process ID.
func (p *Process) PID() int { return p.pid }

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the end of the program and returns how it ended.
func (p *Process) Wait() error {
	<-p.done
	return p.err
}

// Stop ends the program, by SIGTERM and after patience by SIGKILL, and waits
// until it is gone. A program that has ended already is no error, nor is one
// that ends by the signal or with a code of its own.
func (p *Process) Stop(patience time.Duration) error {
	if err := p.signal(unix.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(patience):
	}
	if err := p.signal(unix.SIGKILL); err != nil {
		return err
	}
	<-p.done
	return nil
}

func (p *Process) signal(sig unix.Signal) error {
	select {
	case <-p.done:
		return nil
	default:
	}
	if err := unix.Kill(p.pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("stop %s (pid %d): %w", p.name, p.pid, err)
	}
	return nil
}
