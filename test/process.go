// SPDX-License-Identifier: MPL-2.0

package test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// helperEnv names the function that a re-executed test binary runs.
const helperEnv = "WEIR_TEST_HELPER"

const (
	clientFunc = "test.client"
	echoFunc   = "test.echo"
)

// Spec says who a process is: the identity that an eBPF program sees.
type Spec struct {
	// NetNS is the process's network namespace. Required.
	NetNS *NetNS
	// Cgroup is where the process starts; the test's own where it is nil.
	Cgroup *Cgroup
	// UID and GID are the process's user and group.
	UID, GID uint32
	// PIDNS is a process in whose PID namespace this one shall be seen; the test's
	// own where it is 0.
	PIDNS int
}

// Process is a running helper: the test binary itself, in another role.
type Process struct {
	PID int // nsenter's where Spec.PIDNS is set

	mutex  sync.Mutex
	cmd    *exec.Cmd
	input  io.WriteCloser
	output *bufio.Reader
	errors *bytes.Buffer
	stop   func()
}

// Main is the body of TestMain in a package whose tests start processes. In a
// process that [Helper] started it runs the named function and exits; otherwise it
// runs the tests.
func Main(m *testing.M, funcs map[string]func(args []string) error) {
	name := os.Getenv(helperEnv)
	if name == "" {
		os.Exit(m.Run())
	}
	f := funcs[name]
	switch name {
	case clientFunc:
		f = func([]string) error { return Serve(serveAsk) }
	case echoFunc:
		f = func(args []string) error { return serveEcho(args[0], args[1], args[2]) }
	}
	if f == nil {
		fmt.Fprintf(os.Stderr, "no helper function %q\n", name)
		os.Exit(2)
	}
	// What follows "--" is the function's; see Helper.
	if err := f(os.Args[slices.Index(os.Args, "--")+1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Serve is the loop of a helper function: it answers each request on standard input
// by f, until the test closes it. See [Process.Call].
func Serve[Request, Response any](f func(Request) (Response, error)) error {
	requests, responses := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var request Request
		if err := requests.Decode(&request); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		value, err := f(request)
		if err := responses.Encode(envelope(value, err)); err != nil {
			return fmt.Errorf("write response: %w", err)
		}
	}
}

// Helper starts a process that runs the function which [Main] knows by that name.
// It is killed when the test ends.
func Helper(tb testing.TB, spec Spec, name string, args ...string) *Process {
	tb.Helper()
	// The link, not its target: go test builds where other users cannot look. The
	// flag keeps a binary whose TestMain does not call Main from running its tests.
	args = append([]string{"-test.run=^$", "--"}, args...)
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	switch {
	case spec.PIDNS != 0:
		binary, err := os.Open("/proc/self/exe")
		if err != nil {
			tb.Fatalf("open test binary: %v", err)
		}
		defer binary.Close()
		cmd = insidePIDNS(spec, args)
		cmd.ExtraFiles = []*os.File{binary}
	case spec.UID != 0 || spec.GID != 0:
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: spec.UID, Gid: spec.GID}
	}
	cmd.Env = append(os.Environ(), helperEnv+"="+name)
	cmd.Dir = "/"
	if spec.Cgroup != nil {
		fd, err := unix.Open(spec.Cgroup.Path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			tb.Fatalf("open cgroup: %v", err)
		}
		defer unix.Close(fd)
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, fd
	}
	p := &Process{cmd: cmd, errors: &bytes.Buffer{}}
	cmd.Stderr = p.errors
	var err error
	if p.input, err = cmd.StdinPipe(); err != nil {
		tb.Fatalf("start helper: %v", err)
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatalf("start helper: %v", err)
	}
	p.output = bufio.NewReader(output)
	spec.NetNS.Do(func() { err = cmd.Start() })
	if err != nil {
		tb.Fatalf("start helper %s: %v", name, err)
	}
	p.PID = cmd.Process.Pid
	p.stop = sync.OnceFunc(func() {
		// Both report what the test wants: that the process ended, and by a signal.
		_ = cmd.Process.Kill()
		_ = p.input.Close()
		_ = cmd.Wait()
	})
	tb.Cleanup(func() {
		p.Stop()
		if tb.Failed() && p.errors.Len() > 0 {
			tb.Logf("helper %s said: %s", name, p.errors)
		}
	})
	return p
}

// insidePIDNS calls nsenter, which alone can take another user after it has
// entered the namespace. Descriptor 3 is the test binary. Killed, it leaves a child
// behind, which ends with its standard input.
func insidePIDNS(spec Spec, args []string) *exec.Cmd {
	args = append([]string{
		"--target", strconv.Itoa(spec.PIDNS), "--pid", "--setuid", fmt.Sprint(spec.UID), "--setgid", fmt.Sprint(spec.GID), "--", "/proc/self/fd/3",
	}, args...)
	cmd := exec.Command("nsenter", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	return cmd
}

// Call sends a request and reads the response into response, which is a pointer or
// nil. An error of the function keeps its errno for [errors.Is].
func (p *Process) Call(request, response any) error {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	line, err := json.Marshal(request)
	if err != nil {
		return fmt.Errorf("encode request: %w", err)
	}
	if _, err := p.input.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("send request: %w", err)
	}
	return p.receive(response)
}

// Stop kills the process and waits for its end.
func (p *Process) Stop() { p.stop() }

func (p *Process) receive(response any) error {
	line, err := p.output.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("read response: %w", err)
	}
	var got struct {
		Value json.RawMessage
		Error *remoteError
	}
	if err := json.Unmarshal(line, &got); err != nil {
		return fmt.Errorf("decode response %q: %w", line, err)
	}
	if got.Error != nil {
		return got.Error
	}
	if response == nil {
		return nil
	}
	return json.Unmarshal(got.Value, response)
}

type response struct {
	Value any
	Error *remoteError
}

func envelope(value any, err error) response {
	if err == nil {
		return response{Value: value}
	}
	remote := &remoteError{Text: err.Error()}
	errors.As(err, &remote.Errno)
	return response{Error: remote}
}

// remoteError is an error of a helper's function.
type remoteError struct {
	Text  string
	Errno syscall.Errno
}

func (e *remoteError) Error() string { return e.Text }

func (e *remoteError) Unwrap() error {
	if e.Errno == 0 {
		return nil
	}
	return e.Errno
}

// Client is a process that dials.
type Client struct{ *Process }

type askRequest struct{ Network, Addr string }

// NewClient starts a process that dials when [Client.Ask] says so.
func NewClient(tb testing.TB, spec Spec) *Client {
	tb.Helper()
	return &Client{Helper(tb, spec, clientFunc)}
}

// Ask is the function [Ask], done by the client's process.
func (c *Client) Ask(network, addr string) (Answer, error) {
	var answer Answer
	err := c.Call(askRequest{network, addr}, &answer)
	return answer, err
}

func serveAsk(request askRequest) (Answer, error) { return ask(request.Network, request.Addr) }

// ServerProcess is a [Server] in a process of its own.
type ServerProcess struct {
	*Process `json:"-"`

	Name string
	Addr netip.AddrPort
}

// EchoProcess is [Echo] in a process of its own.
func EchoProcess(tb testing.TB, spec Spec, network, addr string) *ServerProcess {
	tb.Helper()
	where := fmt.Sprintf("in %s by user %d", spec.NetNS.Path, spec.UID)
	server := &ServerProcess{Process: Helper(tb, spec, echoFunc, where, network, addr)}
	if err := server.receive(server); err != nil {
		tb.Fatalf("start echo server: %v", err)
	}
	return server
}

func serveEcho(where, network, addr string) error {
	output := json.NewEncoder(os.Stdout)
	server, err := listen(where, network, addr)
	if err != nil {
		return output.Encode(envelope(nil, err))
	}
	defer server.Close()
	if err := output.Encode(envelope(ServerProcess{Name: server.Name, Addr: server.Addr}, nil)); err != nil {
		return err
	}
	// The test holds the other end: it closes when the test is done or dead.
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}
