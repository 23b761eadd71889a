// SPDX-License-Identifier: MPL-2.0

package envoy

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/weirmesh/weir/test/spawn"
)

// Spec says which Envoy to run and where.
type Spec struct {
	Binary string // path of the envoy executable
	Config Config
	NetNS  string // path of the allocation's namespace
	Cgroup string // directory of Envoy's own cgroup; the caller's where empty
	UID    uint32 // Nomad's default is 101
	// Dir takes the bootstrap, the access log and Envoy's own log. It must
	// exist, be Envoy's alone, and UID must be able to reach it.
	Dir string
	// Concurrency is the number of workers, each with a listener socket of
	// its own; 2 where zero.
	Concurrency int
}

// Connection is a line of the access log: one connection that has ended.
type Connection struct {
	Listener string         `json:"listener"` // "outbound" or "inbound"
	Cluster  string         `json:"cluster"`  // where it was sent
	Local    netip.AddrPort `json:"local"`    // outbound: the origin; inbound: what the peer dialled
	Remote   netip.AddrPort `json:"remote"`   // who dialled
	Direct   netip.AddrPort `json:"direct"`   // the accepted socket's own local address
	Upstream string         `json:"upstream"` // the address Envoy dialled; "" where it dialled none
	From     netip.AddrPort `json:"from"`     // ... and from where
	Flags    string         `json:"flags"`    // Envoy's response flags; "-" where all was well
}

// Proxy is a running Envoy.
type Proxy struct {
	spec    Spec
	process *spawn.Process
}

// stopPatience is how long Envoy may take to end before it is killed.
const stopPatience = 5 * time.Second

// Start starts Envoy and returns once it is ready: all listeners are open.
// The access log of an earlier Envoy in the same directory is kept and
// continued.
func Start(ctx context.Context, spec Spec) (*Proxy, error) {
	if spec.Concurrency == 0 {
		spec.Concurrency = 2
	}
	p := &Proxy{spec: spec}
	bootstrap, err := spec.Config.Bootstrap(p.path("access.log"))
	if err != nil {
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	if err := os.WriteFile(p.path("bootstrap.json"), bootstrap, 0o644); err != nil {
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	if err := os.Chown(spec.Dir, int(spec.UID), int(spec.UID)); err != nil {
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	log, err := os.OpenFile(p.path("envoy.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	defer log.Close()
	p.process, err = spawn.Start(spawn.Spec{
		Binary: spec.Binary,
		Args: []string{
			"-c", p.path("bootstrap.json"), "--disable-hot-restart",
			"--concurrency", fmt.Sprint(spec.Concurrency), "--log-level", "warn",
			"--file-flush-interval-msec", "10",
		},
		NetNS: spec.NetNS, Cgroup: spec.Cgroup, UID: spec.UID, Dir: spec.Dir,
		Stdout: log, Stderr: log,
	})
	if err != nil {
		return nil, err
	}
	if err := p.awaitReady(ctx); err != nil {
		return nil, errors.Join(err, p.Stop())
	}
	return p, nil
}

// awaitReady asks the admin API, from inside the namespace, until it says
// that the listeners are open.
func (p *Proxy) awaitReady(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		last := p.askReady(ctx)
		if last == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("await envoy: %w; last answer: %w; envoy wrote: %s", ctx.Err(), last, p.log())
		case <-p.process.Done():
			return fmt.Errorf("await envoy: it ended: %w; envoy wrote: %s", p.process.Wait(), p.log())
		case <-tick.C:
		}
	}
}

// askReady asks once. It does not use http.Client, whose dials go on behind
// the back of a request that gave up: nothing may dial once Start returns.
func (p *Proxy) askReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := spawn.Dialer(p.spec.NetNS)(ctx, "tcp", p.spec.Config.Admin.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(conn, "GET /ready HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", p.spec.Config.Admin); err != nil {
		return err
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	return nil
}

// PID is Envoy's process ID.
func (p *Proxy) PID() int { return p.process.PID() }

// Stop ends Envoy and waits until it is gone.
func (p *Proxy) Stop() error { return p.process.Stop(stopPatience) }

// Connections returns the access log so far: the connections that ended, in
// the order of their end.
func (p *Proxy) Connections() ([]Connection, error) {
	text, err := os.ReadFile(p.path("access.log"))
	if err != nil {
		return nil, fmt.Errorf("read access log: %w", err)
	}
	var list []Connection
	lines := bufio.NewScanner(bytes.NewReader(text[:bytes.LastIndexByte(text, '\n')+1]))
	for lines.Scan() {
		var c Connection
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			return nil, fmt.Errorf("read access log: %w: %s", err, lines.Text())
		}
		list = append(list, c)
	}
	return list, nil
}

// Await returns the access log from the given line on, as soon as it has at
// least count more lines.
func (p *Proxy) Await(ctx context.Context, from, count int) ([]Connection, error) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		list, err := p.Connections()
		if err != nil {
			return nil, err
		}
		if len(list) >= from+count {
			return list[from:], nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("await %d lines of the access log, have %d: %w", from+count, len(list), ctx.Err())
		case <-tick.C:
		}
	}
}

func (p *Proxy) path(name string) string { return filepath.Join(p.spec.Dir, name) }

func (p *Proxy) log() string {
	text, err := os.ReadFile(p.path("envoy.log"))
	if err != nil {
		return err.Error()
	}
	return string(bytes.TrimSpace(text))
}
