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
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

type object = map[string]any

// A consul is a real agent of Consul's on loopback, a server or a client.
type consul struct {
	http   string
	server int // port of the servers' RPC; 0: it is a client
	serf   int
	cmd    *exec.Cmd
}

// startConsul starts a server, or a client of the server.
func startConsul(ctx context.Context, program, dir, name string, of *consul) (*consul, error) {
	ports, err := freePorts(5)
	if err != nil {
		return nil, err
	}
	c := &consul{http: fmt.Sprintf("127.0.0.1:%d", ports[0]), serf: ports[1]}
	config := object{
		"node_name": name, "datacenter": "dc1", "data_dir": filepath.Join(dir, name), "bind_addr": "127.0.0.1", "client_addr": "127.0.0.1",
		"log_level": "warn", "disable_update_check": true, "disable_host_node_id": true, "connect": object{"enabled": true},
		"limits":    object{"http_max_conns_per_client": 15_000, "rpc_max_conns_per_client": 1000},
		"telemetry": object{"prometheus_retention_time": "1h", "disable_hostname": true},
	}
	here := object{"http": ports[0], "serf_lan": ports[1], "serf_wan": -1, "dns": -1, "grpc": ports[3], "grpc_tls": -1, "server": ports[2]}
	if config["ports"] = here; of == nil {
		c.server = ports[2]
		config["server"], config["bootstrap_expect"] = true, 1
		config["performance"] = object{"raft_multiplier": 1}
	} else {
		here["server"] = of.server // a client has none of its own, but must know the port
		config["retry_join"] = []string{fmt.Sprintf("127.0.0.1:%d", of.serf)}
	}
	data, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, name+".json")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(dir, name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	c.cmd = exec.CommandContext(ctx, program, "agent", "-config-file", path)
	c.cmd.Stdout, c.cmd.Stderr = log, log
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start Consul: %w", err)
	}
	err = until(ctx, time.Minute, func() error {
		var leader string
		if err := c.get(ctx, "/v1/status/leader", &leader); err != nil {
			return err
		}
		if leader == "" {
			return errors.New("there is no leader")
		}
		return c.put(ctx, "/v1/catalog/register", object{"Node": "probe", "Address": "10.0.0.1"})
	})
	if err != nil {
		text, _ := os.ReadFile(log.Name())
		return nil, errors.Join(fmt.Errorf("start Consul: %w\n%s", err, text), c.stop())
	}
	return c, nil
}

// stop ends it as a crash does.
func (c *consul) stop() error {
	if err := c.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop Consul: %w", err)
	}
	_ = c.cmd.Wait() // it was killed
	return nil
}

func (c *consul) put(ctx context.Context, path string, value any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	_, err = c.call(ctx, http.MethodPut, path, bytes.NewReader(data))
	return err
}

func (c *consul) get(ctx context.Context, path string, answer any) error {
	text, err := c.call(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, answer)
}

func (c *consul) call(ctx context.Context, method, path string, body io.Reader) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, method, "http://"+c.http+path, body)
	if err != nil {
		return nil, err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s: %.200s", method, path, response.Status, text)
	}
	return text, err
}

// requests is how many the servers have answered, of any kind.
func (c *consul) requests(ctx context.Context) (float64, error) {
	text, err := c.call(ctx, http.MethodGet, "/v1/agent/metrics?format=prometheus", nil)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, found := strings.CutPrefix(line, "consul_rpc_request "); found {
			return strconv.ParseFloat(strings.TrimSpace(value), 64)
		}
	}
	return 0, errors.New("read requests of Consul: the answer lacks consul_rpc_request")
}

// sent is how many bytes the server has sent to clients on the connections that it has.
func (c *consul) sent(ctx context.Context) (sum float64, err error) {
	text, err := exec.CommandContext(ctx, "ss", "-tinH", "state", "established", "sport", "=", fmt.Sprintf(":%d", c.server)).Output()
	if err != nil {
		return 0, fmt.Errorf("read bytes sent by Consul: ss: %w", err)
	}
	for field := range strings.FieldsSeq(string(text)) {
		if value, found := strings.CutPrefix(field, "bytes_sent:"); found {
			n, err := strconv.ParseFloat(value, 64)
			if err != nil {
				return 0, err
			}
			sum += n
		}
	}
	return sum, nil
}

// cpu is the time that the process took of processors, in seconds.
func (c *consul) cpu() (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest)
	const user, system, perSecond = 11, 12, 100 // USER_HZ
	if len(fields) <= system {
		return 0, errors.New("read CPU of Consul: the line is too short")
	}
	var ticks float64
	for _, field := range []string{fields[user], fields[system]} {
		n, err := strconv.ParseFloat(field, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return ticks / perSecond, nil
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
