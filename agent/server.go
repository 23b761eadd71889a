// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/net/netutil"
)

// socketName is the agent's local API in the state directory.
const socketName = "agent.sock"

// telemetryConnections is how many may be open at a time: whoever can reach the
// address must not use up the files that the agent may open.
const telemetryConnections = 64

// servers are what the agent shows itself on.
type servers struct{ list []*http.Server }

// listen opens the local API, and metrics and health where the operator named
// an address for them.
func (a *Agent) listen() (*servers, error) {
	s := &servers{}
	local, err := listenLocal(filepath.Join(a.datapath.Paths().StateDir, socketName))
	if err != nil {
		return nil, err
	}
	s.serve(a, local, a.localAPI())
	if a.config.Telemetry.Listen == "" {
		return s, nil
	}
	public, err := net.Listen("tcp", a.config.Telemetry.Listen)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen for telemetry: %w", err), s.close())
	}
	public = netutil.LimitListener(public, telemetryConnections)
	a.mu.Lock()
	a.status.Telemetry = public.Addr().String()
	a.mu.Unlock()
	s.serve(a, public, a.telemetry())
	return s, nil
}

// listenLocal makes a socket that only root can open. One that another agent
// still answers on is left alone.
func listenLocal(path string) (net.Listener, error) {
	if conn, err := net.Dial("unix", path); err == nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: another agent runs", path), conn.Close())
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove stale socket: %w", err)
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on local API: %w", err)
	}
	// The directory is root's alone, so nobody was there before.
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("restrict local API: %w", err), listener.Close())
	}
	return listener, nil
}

func (s *servers) serve(a *Agent, listener net.Listener, handler http.Handler) {
	server := &http.Server{
		Handler: handler, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: time.Minute,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
	s.list = append(s.list, server)
	go func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			a.trouble("serve "+listener.Addr().String(), err)
		}
	}()
}

func (s *servers) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var problems []error
	for _, server := range s.list {
		if server.Shutdown(ctx) != nil {
			problems = append(problems, server.Close())
		}
	}
	return errors.Join(problems...)
}

// localAPI answers the CLI.
func (a *Agent) localAPI() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		a.writeJSON(w, http.StatusOK, a.Status())
	})
	return mux
}

// telemetry shows what may be shown to anybody who can reach the address.
func (a *Agent) telemetry() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", a.metrics())
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		status := a.Status()
		healthy, why := status.Healthy(time.Now())
		code := http.StatusOK
		if !healthy {
			code = http.StatusServiceUnavailable
		}
		a.writeJSON(w, code, map[string]any{"healthy": healthy, "why": why, "consul_in_step": status.Consul.InStep})
	})
	return mux
}

func (a *Agent) writeJSON(w http.ResponseWriter, code int, value any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	if err := json.NewEncoder(w).Encode(value); err != nil {
		a.log.Debug("answer not delivered", "error", err)
	}
}

// ErrNotRunning says that no agent answers on the local API.
var ErrNotRunning = errors.New("the agent does not run")

// ReadStatus asks the agent whose state is in stateDir.
func ReadStatus(ctx context.Context, stateDir string) (Status, error) {
	path := filepath.Join(stateDir, socketName)
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/v1/status", nil)
	if err != nil {
		return Status{}, fmt.Errorf("ask agent: %w", err)
	}
	response, err := client.Do(request)
	var dial *net.OpError
	if errors.As(err, &dial) && dial.Op == "dial" {
		return Status{}, fmt.Errorf("ask agent: %w: %w", ErrNotRunning, err)
	}
	if err != nil {
		return Status{}, fmt.Errorf("ask agent: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return Status{}, fmt.Errorf("ask agent: answer %s", response.Status)
	}
	const statusLimit = 64 << 20 // bytes; an allocation has one to two thousand
	var status Status
	if err := json.NewDecoder(&boundedBody{body: response.Body, limit: statusLimit}).Decode(&status); err != nil {
		return Status{}, fmt.Errorf("ask agent: %w", err)
	}
	return status, nil
}
