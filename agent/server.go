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

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/web"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"golang.org/x/net/netutil"
)

// telemetryConnections is how many may be open at a time: whoever can reach the
// address must not use up the files that the agent may open.
const telemetryConnections = 64

// servers are what the agent shows itself on.
type servers struct {
	local  *http.Server // nil: the socket could not be made
	public *http.Server // nil: the operator named no address
}

// listen opens the local API, and metrics and health where the operator named
// an address for them.
func (a *Agent) listen() error {
	err := a.listenLocally()
	if _, unseen := inspect.CouldNotLook(err); unseen {
		a.warnOnce("open the local API", err) // and tried again
	} else if err != nil {
		return err
	}
	if a.config.Telemetry.Listen == "" {
		return nil
	}
	public, err := net.Listen("tcp", a.config.Telemetry.Listen)
	if err != nil {
		return errors.Join(fmt.Errorf("listen for telemetry: %w", err), a.servers.close())
	}
	public = netutil.LimitListener(public, telemetryConnections)
	a.mu.Lock()
	a.status.Telemetry = public.Addr().String()
	a.mu.Unlock()
	a.servers.public = a.serve(public, a.telemetry())
	return nil
}

func (a *Agent) socketPath() string {
	return filepath.Join(a.datapath.Paths().StateDir, api.SocketName)
}

func (a *Agent) listenLocally() error {
	local, err := listenLocal(a.socketPath())
	if err != nil {
		return err
	}
	a.servers.local = a.serve(local, a.localAPI())
	return nil
}

// keepSocket makes the socket of the local API anew where somebody removed it.
func (a *Agent) keepSocket() {
	if a.servers.local != nil && host.Inode(a.socketPath()) != 0 {
		return // ours, or another agent's, which it is not for us to remove
	}
	if a.servers.local != nil {
		// First: a listener that is closed removes what has its path.
		if err := a.servers.local.Close(); err != nil {
			a.warnOnce("close the local API", err)
		}
		a.servers.local = nil
		a.log.Warn("the socket of the local API is gone: it is made anew", "path", a.socketPath())
	}
	if err := a.listenLocally(); errorText(err) != a.socketError {
		a.socketError = errorText(err)
		if err != nil {
			a.warnOnce("open the local API", err)
		}
	}
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
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("create state directory: %w", err)
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

func (a *Agent) serve(listener net.Listener, handler http.Handler) *http.Server {
	server := &http.Server{
		Handler: handler, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: time.Minute,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
	go func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			a.warnOnce("serve "+listener.Addr().String(), err)
		}
	}()
	return server
}

func (s *servers) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var problems []error
	for _, server := range []*http.Server{s.local, s.public} {
		if server != nil && server.Shutdown(ctx) != nil {
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
	mux.HandleFunc("GET /v1/flows", a.flows.ServeFlows)
	mux.HandleFunc("GET /v1/events", a.flows.ServeEvents)
	mux.HandleFunc("GET /v1/guard", a.serveGuard)
	mux.HandleFunc("GET /v1/behind", a.serveBehind)
	mux.HandleFunc("GET /v1/traffic", a.serveTraffic)
	mux.HandleFunc("GET /v1/changes", a.changes.Serve)
	return mux
}

// telemetry shows what may be shown to anybody who can reach the address.
func (a *Agent) telemetry() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", a.metrics())
	node, _ := os.Hostname() // without it the map has no name but its addresses
	web.Register(mux, mapSource{a}, web.Clients(a.config.Telemetry.Map), node)
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		status := a.Status()
		healthy, why := status.Healthy(time.Now())
		code := http.StatusOK
		if !healthy {
			code = http.StatusServiceUnavailable
		}
		a.writeJSON(w, code, map[string]any{"healthy": healthy, "why": why, "consul_in_sync": status.Consul.InSync})
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
