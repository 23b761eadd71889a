// SPDX-License-Identifier: MPL-2.0

// Package consul runs a real Consul for tests: one server on loopback, with
// ports and data of its own.
package consul

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// ErrNotInstalled says that no Consul is on this machine yet.
var ErrNotInstalled = errors.New("consul is not installed: run test/tools/setup.sh consul")

// Find returns the path of Consul: the one that WEIR_TEST_CONSUL names, else the one
// that test/tools/setup.sh has built below .tools of the module that the working
// directory is in, else the one on PATH.
func Find() (string, error) {
	if path := os.Getenv("WEIR_TEST_CONSUL"); path != "" {
		return path, nil
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find consul: %w", err)
	}
	for ; dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		if path, err := exec.LookPath(filepath.Join(dir, ".tools", "bin", "consul")); err == nil {
			return path, nil
		}
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
	}
	path, err := exec.LookPath("consul")
	if err != nil {
		return "", ErrNotInstalled
	}
	return filepath.Abs(path)
}

// Server is a Consul server that is also the node's local agent.
type Server struct {
	Address string // of the HTTP API: host:port, or unix:// where it is in a namespace
	XDS     string // the Unix socket that proxies in any namespace reach it by
	DNS     uint16 // the port of its DNS, for UDP and TCP
	Token   string // that its own requests carry; the management token with ACLs
	TLS     TLS    // where WithTLS was asked for

	tb     testing.TB
	binary string
	dir    string
	netns  *test.NetNS // nil: the test's own
	cmd    *exec.Cmd
	ended  chan struct{}
}

// ManagementToken may do everything where Start was called with ACLs.
const ManagementToken = "8e3b0b4c-7d0a-4a52-9d3e-2f3a6f4c9a01"

// Start runs a Consul that ends with the test. acls makes it refuse what no
// token allows. Without a Consul on the machine the test is skipped.
func Start(tb testing.TB, acls bool, options ...Option) *Server {
	tb.Helper()
	binary, err := Find()
	if err != nil {
		test.Need(tb, test.Tool("consul")) // says so, and fails where a skip is a failure
		tb.Fatal(err)
	}
	s := &Server{tb: tb, binary: binary, dir: openDir(tb)}
	ports := freePorts(tb, 5)
	s.Address = fmt.Sprintf("127.0.0.1:%d", ports[0])
	s.XDS = filepath.Join(s.dir, "xds.sock")
	s.DNS = uint16(ports[2])
	config := settings{
		"node_name": "node", "datacenter": "dc1", "server": true, "bootstrap_expect": 1, "log_level": "warn",
		"data_dir": filepath.Join(s.dir, "data"), "bind_addr": "127.0.0.1", "client_addr": "127.0.0.1",
		"addresses": settings{"grpc": "unix://" + s.XDS}, "unix_sockets": settings{"mode": "0777"},
		"ports": settings{
			"http": ports[0], "grpc": ports[1], "grpc_tls": -1, "dns": ports[2], "server": ports[3], "serf_lan": ports[4], "serf_wan": -1,
		},
		"connect":              settings{"enabled": true},
		"performance":          settings{"raft_multiplier": 1},
		"disable_update_check": true, "leave_on_terminate": false,
	}
	if acls {
		s.Token = ManagementToken
		config["acl"] = settings{
			"enabled": true, "default_policy": "deny",
			"tokens": settings{"initial_management": ManagementToken, "agent": ManagementToken},
		}
	}
	for _, option := range options {
		option(s, config)
	}
	data, err := json.Marshal(config)
	if err == nil {
		err = os.WriteFile(filepath.Join(s.dir, "consul.json"), data, 0o600)
	}
	if err != nil {
		tb.Fatalf("write configuration of Consul: %v", err)
	}
	tb.Cleanup(s.Stop)
	s.Restart()
	return s
}

// Restart starts a Consul that was stopped, on the same ports and data, and
// waits until it has a leader.
func (s *Server) Restart() {
	s.tb.Helper()
	log, err := os.OpenFile(filepath.Join(s.dir, "consul.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		s.tb.Fatalf("start Consul: %v", err)
	}
	defer log.Close()
	cmd := exec.Command(s.binary, "agent", "-config-file", filepath.Join(s.dir, "consul.json"))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	start := cmd.Start
	if s.netns != nil {
		start = func() (err error) {
			s.netns.Do(func() { err = cmd.Start() })
			return err
		}
	}
	if err := start(); err != nil {
		s.tb.Fatalf("start Consul: %v", err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // it is stopped by a signal
		close(ended)
	}()
	s.cmd, s.ended = cmd, ended
	test.Eventually(s.tb, func() error {
		select {
		case <-ended:
			s.tb.Fatalf("Consul ended: %s", s.log())
		default:
		}
		var nodes []any
		if err := s.call(http.MethodGet, "/v1/catalog/nodes", nil, &nodes); err != nil {
			return err
		}
		if len(nodes) == 0 {
			return errors.New("no node in the catalog yet")
		}
		return nil
	}, "Consul to be ready")
}

// Stop ends Consul as a crash does, and returns when it is gone.
func (s *Server) Stop() {
	if s.cmd == nil {
		return
	}
	if err := s.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		s.tb.Errorf("stop Consul: %v", err)
	}
	<-s.ended
	s.cmd = nil
}

func (s *Server) log() string {
	data, _ := os.ReadFile(filepath.Join(s.dir, "consul.log"))
	return string(data[max(0, len(data)-2000):])
}

// Bootstrap is what Envoy is started with for a registered proxy: the answer of
// "consul connect envoy -bootstrap", which Nomad calls too.
func (s *Server) Bootstrap(proxyID, admin string, more ...string) []byte {
	s.tb.Helper()
	args := append([]string{
		"connect", "envoy", "-bootstrap", "-proxy-id", proxyID, "-admin-bind", admin, "-http-addr", s.Address, "-grpc-addr", "unix://" + s.XDS,
	}, more...)
	cmd := exec.Command(s.binary, args...)
	cmd.Env = append(os.Environ(), "CONSUL_HTTP_TOKEN="+s.Token)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	text, err := cmd.Output()
	if err != nil {
		s.tb.Fatalf("make bootstrap of %s: %v: %s", proxyID, err, stderr.String())
	}
	return text
}

// Put sends a value to the HTTP API.
func (s *Server) Put(path string, value any) {
	s.tb.Helper()
	if err := s.call(http.MethodPut, path, value, nil); err != nil {
		s.tb.Fatal(err)
	}
}

// Post is Put for what Consul answers.
func (s *Server) Post(path string, value, answer any) {
	s.tb.Helper()
	if err := s.call(http.MethodPut, path, value, answer); err != nil {
		s.tb.Fatal(err)
	}
}

// Get reads a value from the HTTP API.
func (s *Server) Get(path string, value any) {
	s.tb.Helper()
	if err := s.call(http.MethodGet, path, nil, value); err != nil {
		s.tb.Fatal(err)
	}
}

// Delete removes what the HTTP API has at the path.
func (s *Server) Delete(path string) {
	s.tb.Helper()
	if err := s.call(http.MethodDelete, path, nil, nil); err != nil {
		s.tb.Fatal(err)
	}
}

// Register registers a service, as Nomad does, with the local agent.
func (s *Server) Register(service any) {
	s.tb.Helper()
	s.Put("/v1/agent/service/register", service)
}

// Deregister removes a service by its ID.
func (s *Server) Deregister(id string) {
	s.tb.Helper()
	s.Put("/v1/agent/service/deregister/"+id, nil)
}

func (s *Server) call(method, path string, value, answer any) error {
	var body io.Reader
	if value != nil {
		data, err := json.Marshal(value)
		if err != nil {
			return fmt.Errorf("%s %s: %w", method, path, err)
		}
		body = bytes.NewReader(data)
	}
	request, err := http.NewRequest(method, "http://consul"+path, body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if s.Token != "" {
		request.Header.Set("X-Consul-Token", s.Token)
	}
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: s.dial}}
	response, err := client.Do(request)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(response.Body, 500))
		return fmt.Errorf("%s %s: %s: %s", method, path, response.Status, strings.TrimSpace(string(text)))
	}
	if answer == nil {
		return nil
	}
	if err := json.NewDecoder(response.Body).Decode(answer); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}

func (s *Server) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	if path, ok := strings.CutPrefix(s.Address, "unix://"); ok {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}
	return new(net.Dialer).DialContext(ctx, "tcp", s.Address)
}

// openDir is a directory that proxies of any user can reach.
func openDir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "weir-consul-")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		tb.Fatalf("make directory for Consul: %v", err)
	}
	tb.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			tb.Errorf("remove directory of Consul: %v", err)
		}
	})
	return dir
}

// Ports of Consul are above those that the kernel gives to whoever asks for any, so that
// no connection takes one while a Consul restarts.
const firstPort, lastPort = 61000, 65535

// freePorts are ports that nobody has, for TCP and UDP, and that no other test is given
// until this one ends: tests run beside each other, also of several packages.
func freePorts(tb testing.TB, count int) []int {
	tb.Helper()
	locks := filepath.Join(os.TempDir(), fmt.Sprintf("weir-test-ports-%d", os.Getuid()))
	if err := os.MkdirAll(locks, 0o700); err != nil {
		tb.Fatalf("find free port: %v", err)
	}
	var ports []int
	for _, offset := range rand.Perm(lastPort - firstPort + 1) {
		if len(ports) == count {
			return ports
		}
		port := firstPort + offset
		lock, err := os.OpenFile(filepath.Join(locks, strconv.Itoa(port)), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			tb.Fatalf("find free port: %v", err)
		}
		if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil || !isFree(port) {
			lock.Close()
			continue
		}
		tb.Cleanup(func() { lock.Close() })
		ports = append(ports, port)
	}
	tb.Fatalf("find free port: %d of %d are free in %d-%d", len(ports), count, firstPort, lastPort)
	return nil
}

// isFree reports whether nobody listens on a port, for TCP or UDP.
func isFree(port int) bool {
	address := fmt.Sprintf("127.0.0.1:%d", port)
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return false
	}
	defer listener.Close()
	packets, err := net.ListenPacket("udp", address)
	if err != nil {
		return false
	}
	return packets.Close() == nil
}
