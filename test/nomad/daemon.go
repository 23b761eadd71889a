// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Daemon is a service of the node.
type Daemon struct {
	Name string

	machine *machine
	args    []string
	env     []string
	log     string // a file of this machine
	ready   func() error
	patient time.Duration

	cmd   *exec.Cmd
	ended chan struct{}
}

// Start starts the service and returns when it is ready.
func (d *Daemon) Start(tb testing.TB) {
	tb.Helper()
	began := time.Now()
	d.Launch(tb)
	d.AwaitReady(tb)
	tb.Logf("node: %s is ready after %s", d.Name, time.Since(began).Round(time.Millisecond))
}

// Launch starts the service.
func (d *Daemon) Launch(tb testing.TB) {
	tb.Helper()
	log, err := os.OpenFile(d.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		tb.Fatalf("start %s: %v", d.Name, err)
	}
	defer log.Close()
	cmd := d.machine.command(context.Background(), d.args[0], d.args[1:]...)
	cmd.Env = append(cmd.Env, d.env...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := d.machine.run(cmd); err != nil {
		tb.Fatalf("start %s: %v", d.Name, err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // how it ended is in its log
		close(ended)
	}()
	d.cmd, d.ended = cmd, ended
}

// AwaitReady waits until a service that was launched is ready.
func (d *Daemon) AwaitReady(tb testing.TB) {
	tb.Helper()
	eventually(tb, d.patient, func() error {
		select {
		case <-d.ended:
			tb.Fatalf("%s ended by itself: %s", d.Name, d.Tail(3000))
		default:
		}
		return d.ready()
	}, d.Name+" to be ready")
}

// Running tells if the service was started and has not ended.
func (d *Daemon) Running() bool {
	if d.cmd == nil {
		return false
	}
	select {
	case <-d.ended:
		return false
	default:
		return true
	}
}

// Kill ends the service as a crash does (kill -9) and returns when it is gone.
// What it has started lives on.
func (d *Daemon) Kill(tb testing.TB) {
	tb.Helper()
	d.signal(tb, unix.SIGKILL)
	<-d.ended
}

// Stop ends the service in order.
func (d *Daemon) Stop(tb testing.TB) {
	tb.Helper()
	d.signal(tb, unix.SIGTERM)
	select {
	case <-d.ended:
	case <-time.After(30 * time.Second):
		tb.Fatalf("stop %s: it does not end: %s", d.Name, d.Tail(3000))
	}
}

// Restart stops the service in order and starts it again.
func (d *Daemon) Restart(tb testing.TB) {
	tb.Helper()
	d.Stop(tb)
	d.Start(tb)
}

// PID is the process ID as this machine counts.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Log is what the service has written so far, from all its starts.
func (d *Daemon) Log(tb testing.TB) string {
	tb.Helper()
	text, err := os.ReadFile(d.log)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		tb.Fatalf("read log of %s: %v", d.Name, err)
	}
	return string(text)
}

// Tail is the end of the service's log.
func (d *Daemon) Tail(size int) string { return tail(d.log, size) }

func (d *Daemon) signal(tb testing.TB, signal syscall.Signal) {
	tb.Helper()
	if d.cmd == nil {
		tb.Fatalf("stop %s: it was not started", d.Name)
	}
	if err := d.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		tb.Fatalf("stop %s: %v", d.Name, err)
	}
}

func tail(name string, size int) string {
	text, err := os.ReadFile(name)
	if err != nil {
		return err.Error()
	}
	cut := max(0, len(text)-size)
	return fmt.Sprintf("%s (%d bytes before)\n%s", filepath.Base(name), cut, strings.ToValidUTF8(string(text[cut:]), "?"))
}

// eventually polls until check returns nil, and fails the test with the last
// error when that does not happen in time.
func eventually(tb testing.TB, patience time.Duration, check func() error, what string) {
	tb.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatalf("wait %s for %s: %v", patience, what, err)
		}
		<-tick.C
	}
}
