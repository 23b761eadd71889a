// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// object is JSON of Consul's or CNI's.
type object = map[string]any

// A consulServer is a real Consul on loopback, with ports of its own: the
// node's local agent.
type consulServer struct {
	address string // of the HTTP API
	cmd     *exec.Cmd
	client  *http.Client
}

// startConsul runs "consul agent -dev" and waits until it has a leader. Its log
// goes to the file at logPath.
func startConsul(ctx context.Context, program, logPath string) (*consulServer, error) {
	if program == "" {
		return nil, errors.New("start Consul: there is none: run test/tools/setup.sh consul")
	}
	ports, err := freePorts(5)
	if err != nil {
		return nil, fmt.Errorf("start Consul: %w", err)
	}
	log, err := os.Create(logPath)
	if err != nil {
		return nil, fmt.Errorf("start Consul: %w", err)
	}
	defer log.Close()
	flags := []string{"agent", "-dev", "-node", "bench", "-bind", "127.0.0.1", "-client", "127.0.0.1", "-log-level", "warn", "-disable-host-node-id"}
	for i, name := range []string{"http", "dns", "server", "serf-lan", "grpc"} {
		flags = append(flags, fmt.Sprintf("-%s-port=%d", name, ports[i]))
	}
	flags = append(flags, "-serf-wan-port=-1", "-grpc-tls-port=-1", "-hcl", "disable_update_check = true")
	c := &consulServer{
		address: fmt.Sprintf("127.0.0.1:%d", ports[0]),
		cmd:     exec.CommandContext(ctx, program, flags...),
		client:  &http.Client{Timeout: time.Minute},
	}
	c.cmd.Stdout, c.cmd.Stderr = log, log
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start Consul: %w", err)
	}
	err = until(ctx, time.Minute, 100*time.Millisecond, func() error {
		var nodes []any
		if err := c.call(ctx, http.MethodGet, "/v1/catalog/nodes", nil, &nodes); err != nil {
			return err
		}
		if len(nodes) == 0 {
			return errors.New("no node in the catalog")
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start Consul: %w", err), c.stop())
	}
	return c, nil
}

// stop ends Consul as a crash does: nothing of it is kept.
func (c *consulServer) stop() error {
	c.client.CloseIdleConnections()
	if err := c.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop Consul: %w", err)
	}
	_ = c.cmd.Wait() // it was killed
	return nil
}

// register registers a service with the local agent, as Nomad does.
func (c *consulServer) register(ctx context.Context, service object) error {
	return c.call(ctx, http.MethodPut, "/v1/agent/service/register", service, nil)
}

func (c *consulServer) call(ctx context.Context, method, path string, value, answer any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://"+c.address+path, bytes.NewReader(data))
	if err != nil {
		return err
	}
	response, err := c.client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s: %s", method, path, response.Status, strings.TrimSpace(string(text)))
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(text, answer)
}

// freePorts are ports that nobody listens on now.
func freePorts(count int) (ports []int, err error) {
	for range count {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("find free port: %w", err)
		}
		defer listener.Close()
		ports = append(ports, listener.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

// until asks again and again until the answer is no error. The last one comes
// back when that takes too long.
func until(ctx context.Context, patience, step time.Duration, ask func() error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	ticker := time.NewTicker(step)
	defer ticker.Stop()
	for {
		err := ask()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait %s: %w", patience, err)
		case <-ticker.C:
		}
	}
}
