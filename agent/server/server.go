// SPDX-License-Identifier: MPL-2.0

// Package server shows the agent: to the CLI on a socket that only root can open, and to
// Prometheus and browsers on an address, where the operator names one.
package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/change"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/flow"
	"github.com/weirmesh/weir/agent/web"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"golang.org/x/net/netutil"
)

// telemetryConnections is how many may be open at a time: whoever can reach the
// address must not use up the files that the agent may open.
const telemetryConnections = 64

// Source is the agent, as far as it is shown.
type Source interface {
	// Status is its view of the node now.
	Status() api.Status
	// Workloads are the allocations as the last pass found them; nobody writes to them.
	Workloads() []api.WorkloadView
	// Consul is what is known of Consul; nothing where it is not asked.
	Consul() catalog.Snapshot
	// Unseen counts what could not be looked at, by reason.
	Unseen() map[string]int
	// Failed tells of an error that may be over the next time.
	Failed(what string, err error)
}

// Options are what a server shows.
type Options struct {
	Source   Source
	Config   configfile.Config
	Version  string // of the program
	Log      *slog.Logger
	Datapath *redirect.Datapath
	Flows    *flow.Recorder  // nil: they are not recorded
	Catalog  *catalog.Client // nil: Consul is not asked
	Changes  *change.Log
	// ConsulApply is from a change in Consul to the kernel.
	ConsulApply prometheus.Histogram
}

// Server is what the agent shows itself on. The agent's loop calls its methods, one at a
// time.
type Server struct {
	Options

	local       *served // nil: the socket could not be made
	public      *served // nil: the operator named no address
	telemetry   string  // where public listens
	socketError string  // why there is no local API, as last told
}

// New listens nowhere before Listen.
func New(options Options) *Server { return &Server{Options: options} }

// Telemetry is the address of metrics, health and map; empty where there is none.
func (s *Server) Telemetry() string { return s.telemetry }

// Listen opens the local API, and metrics and health where the operator named
// an address for them.
func (s *Server) Listen() error {
	err := s.listenLocally()
	if _, unseen := inspect.CouldNotLook(err); unseen {
		s.Source.Failed("open the local API", err) // and tried again
	} else if err != nil {
		return err
	}
	if s.Config.Telemetry.Listen == "" {
		return nil
	}
	public, err := net.Listen("tcp", s.Config.Telemetry.Listen)
	if err != nil {
		return errors.Join(fmt.Errorf("listen for telemetry: %w", err), s.Close())
	}
	public = netutil.LimitListener(public, telemetryConnections)
	s.telemetry = public.Addr().String()
	s.public = s.serve(public, s.publicAPI())
	return nil
}

func (s *Server) socketPath() string {
	return filepath.Join(s.Datapath.Paths().StateDir, api.SocketName)
}

func (s *Server) listenLocally() error {
	local, err := listenLocal(s.socketPath())
	if err != nil {
		return err
	}
	s.local = s.serve(local, s.LocalAPI())
	return nil
}

// KeepSocket makes the socket of the local API anew where somebody removed it.
func (s *Server) KeepSocket() {
	if s.local != nil && host.Inode(s.socketPath()) != 0 {
		return // ours, or another agent's, which it is not for us to remove
	}
	if s.local != nil {
		// First: a listener that is closed removes what has its path.
		if err := s.local.end(); err != nil {
			s.Source.Failed("close the local API", err)
		}
		s.local = nil
		s.Log.Warn("the socket of the local API is gone: it is made anew", "path", s.socketPath())
	}
	if err := s.listenLocally(); textOf(err) != s.socketError {
		s.socketError = textOf(err)
		if err != nil {
			s.Source.Failed("open the local API", err)
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

// served is a server that has a listener.
type served struct {
	*http.Server
	done chan struct{} // closed when nobody can reach it any more
}

// end closes the server. One that had not begun to serve yet closes its listener only when
// it does: until then others would take it for an agent that runs, and the path that it
// removes could be another one's by then.
func (s *served) end() error {
	err := s.Close()
	<-s.done
	return err
}

func (s *Server) serve(listener net.Listener, handler http.Handler) *served {
	server := &served{done: make(chan struct{}), Server: &http.Server{
		Handler: handler, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: time.Minute,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}}
	go func() {
		defer close(server.done)
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			s.Source.Failed("serve "+listener.Addr().String(), err)
		}
	}()
	return server
}

// Close ends all of it.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var problems []error
	for _, server := range []*served{s.local, s.public} {
		if server == nil {
			continue
		}
		if server.Shutdown(ctx) != nil {
			problems = append(problems, server.Close())
		}
		<-server.done
	}
	return errors.Join(problems...)
}

// LocalAPI answers the CLI.
func (s *Server) LocalAPI() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		s.writeJSON(w, http.StatusOK, s.Source.Status())
	})
	mux.HandleFunc("GET /v1/flows", s.Flows.ServeFlows)
	mux.HandleFunc("GET /v1/events", s.Flows.ServeEvents)
	mux.HandleFunc("GET /v1/guard", s.serveGuard)
	mux.HandleFunc("GET /v1/behind", s.serveBehind)
	mux.HandleFunc("GET /v1/traffic", s.serveTraffic)
	mux.HandleFunc("GET /v1/changes", s.Changes.Serve)
	return mux
}

// telemetry shows what may be shown to anybody who can reach the address.
func (s *Server) publicAPI() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", s.metrics())
	node, _ := os.Hostname() // without it the map has no name but its addresses
	web.Register(mux, s.Map(), web.Clients(s.Config.Telemetry.Map), node)
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		status := s.Source.Status()
		healthy, why := status.Healthy(time.Now())
		code := http.StatusOK
		if !healthy {
			code = http.StatusServiceUnavailable
		}
		s.writeJSON(w, code, map[string]any{"healthy": healthy, "why": why, "consul_in_sync": status.Consul.InSync})
	})
	return mux
}

func (s *Server) writeJSON(w http.ResponseWriter, code int, value any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	if err := json.NewEncoder(w).Encode(value); err != nil {
		s.Log.Debug("answer not delivered", "error", err)
	}
}

func textOf(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
