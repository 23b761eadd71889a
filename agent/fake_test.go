// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/test"
)

func TestMain(m *testing.M) { test.Main(m, nil) }

// fakeConsul is no Consul. It stands in for one that is broken, which a real
// one cannot be made to be: each answer of the bulk read is the test's.
type fakeConsul struct {
	*httptest.Server

	mu          sync.Mutex
	services    http.HandlerFunc
	changes     http.HandlerFunc // to the blocking query
	self        http.HandlerFunc
	chain       http.HandlerFunc
	checks      http.HandlerFunc
	catalog     fakeCatalog
	instances   http.HandlerFunc // of each service; nil: the catalog's
	entry       http.HandlerFunc // of a gateway
	intentions  http.HandlerFunc
	tokens      []string // of the bulk reads
	asked       map[string]int
	connections map[net.Conn]bool
	most        int // connections at a time
}

func newFakeConsul(t *testing.T) *fakeConsul {
	t.Helper()
	f := &fakeConsul{
		services: say(200, "{}"), changes: nothingChanges, self: say(200, `{"Config":{"NodeName":"node"}}`), chain: say(200, `{"Chain":{}}`),
		checks: say(200, "{}"), entry: say(404, "no such entry"), intentions: say(200, "[]"),
		asked: make(map[string]int), connections: make(map[net.Conn]bool),
	}
	f.Server = httptest.NewUnstartedServer(http.HandlerFunc(f.serve))
	f.Config.ConnState = func(conn net.Conn, state http.ConnState) {
		f.mu.Lock()
		defer f.mu.Unlock()
		switch state {
		case http.StateNew:
			f.connections[conn] = true
		case http.StateClosed, http.StateHijacked:
			delete(f.connections, conn)
		}
		f.most = max(f.most, len(f.connections))
	}
	f.Start()
	t.Cleanup(f.Close)
	return f
}

func (f *fakeConsul) serve(w http.ResponseWriter, r *http.Request) {
	path := r.URL.Path
	f.mu.Lock()
	f.asked[path]++
	answer := say(404, "no such page")
	switch {
	case path == "/v1/agent/services":
		f.tokens = append(f.tokens, r.Header.Get("X-Consul-Token"))
		answer = f.services
	case path == "/v1/agent/self":
		answer = f.self
	case path == "/v1/catalog/node-services/node":
		answer = f.changes
	case strings.HasPrefix(path, "/v1/discovery-chain/"):
		answer = f.chain
	case strings.HasPrefix(path, "/v1/health/service/"):
		if answer = f.instances; answer == nil {
			answer = f.catalog.serve
		}
	case path == "/v1/agent/checks":
		answer = f.checks
	case strings.HasPrefix(path, "/v1/config/"):
		answer = f.entry
	case path == "/v1/connect/intentions":
		answer = f.intentions
	}
	f.mu.Unlock()
	answer(w, r)
}

func (f *fakeConsul) answers(services http.HandlerFunc) { f.set(&f.services, services) }

// set gives one of the questions another answer.
func (f *fakeConsul) set(question *http.HandlerFunc, answer http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	*question = answer
}

func (f *fakeConsul) times(path string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked[path]
}

func say(code int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(code)
		fmt.Fprint(w, body)
	}
}

// nothingChanges answers the blocking query as Consul does: at once to who has
// no index, and else not before something changes.
func nothingChanges(w http.ResponseWriter, r *http.Request) {
	if index := r.URL.Query().Get("index"); index != "" && index != "0" {
		untilGone(w, r)
		return
	}
	w.Header().Set("X-Consul-Index", "1")
	fmt.Fprint(w, "{}")
}

// oneInstance is the answer to who asks for those of a service.
func oneInstance(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Consul-Index", "1")
	if index := r.URL.Query().Get("index"); index != "" && index != "0" {
		untilGone(w, r)
		return
	}
	fmt.Fprint(w, `[{"Service": {"CreateIndex": 1}}]`)
}

// consul is what the agent asks the fake by.
func (f *fakeConsul) consul(t *testing.T, patient time.Duration) *catalog.Client {
	t.Helper()
	config := *configfile.DefaultConfig().Consul
	config.Address = f.URL
	c, err := catalog.NewClient(config, catalog.Timeouts{Read: patient, Block: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// unwatched asks for no blocking query: bulk reads come by the clock alone.
func unwatched(config *configfile.ConsulConfig) { config.Watch = false }

// untilGone never answers.
func untilGone(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// trickle sends a byte now and then and never ends.
func trickle(w http.ResponseWriter, r *http.Request) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-r.Context().Done():
			return
		case <-tick.C:
			fmt.Fprint(w, " ")
			w.(http.Flusher).Flush()
		}
	}
}

// flood answers with more than any node has.
func flood(w http.ResponseWriter, r *http.Request) {
	block := []byte(strings.Repeat("a", 1<<20))
	fmt.Fprint(w, `{"`)
	for r.Context().Err() == nil {
		if _, err := w.Write(block); err != nil {
			return
		}
	}
}

// follow runs a watcher of the fake until the test ends.
func (f *fakeConsul) follow(t *testing.T, change ...func(*configfile.ConsulConfig)) *catalog.Watcher {
	t.Helper()
	config := *configfile.DefaultConfig().Consul
	config.Address = f.URL
	for _, edit := range change {
		edit(&config)
	}
	return runWatcher(t, config)
}

// followInHaste is follow where what is asked beside the bulk read is asked again
// twenty times as soon, when the watcher is woken.
func (f *fakeConsul) followInHaste(t *testing.T) *catalog.Watcher {
	t.Helper()
	config := *configfile.DefaultConfig().Consul
	config.Address, config.Watch = f.URL, false
	return runWatcher(t, config, func(f *catalog.Watcher) {
		began := time.Now()
		f.Lookups.Now = func() time.Time { return began.Add(20 * time.Since(began)) }
	})
}

func runWatcher(t *testing.T, config configfile.ConsulConfig, change ...func(*catalog.Watcher)) *catalog.Watcher {
	t.Helper()
	consul, err := catalog.NewClient(config, catalog.Timeouts{Read: 300 * time.Millisecond, Block: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	watcher := catalog.NewWatcher(consul, func() {})
	for _, edit := range change {
		edit(watcher)
	}
	letRun(t, watcher)
	return watcher
}

// letRun runs the watcher until the test ends.
func letRun(t *testing.T, watcher *catalog.Watcher) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		watcher.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case <-done:
		case <-time.After(30 * time.Second):
			t.Error("the watcher does not end")
		}
	})
}

func eventuallyKnown(t *testing.T, f *catalog.Watcher, what string, ok func(catalog.Snapshot) bool) catalog.Snapshot {
	t.Helper()
	var last catalog.Snapshot
	test.Eventually(t, func() error {
		if last = f.Current(); !ok(last) {
			return fmt.Errorf("in sync %v, %q, %d allocations, %+v", last.InSync, last.Error, len(last.Proxies), last.Counts)
		}
		return nil
	}, what)
	return last
}

// newFakeDocker is no Docker. It has one pause container and one task, and
// stands in for one that comes and goes without a dockerd to start.
func newFakeDocker(t *testing.T, socket string) *httptest.Server {
	t.Helper()
	pause, task := strings.Repeat("a", 64), strings.Repeat("b", 64)
	label := fmt.Sprintf(`"Labels":{%q:%q}`, discover.AllocLabel, numbered(1))
	mux := http.NewServeMux()
	mux.HandleFunc("GET /events", func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	mux.Handle("GET /containers/json", say(200, fmt.Sprintf(`[{"Id":%q,"Names":["/nomad_init_%s"],"State":"running",%s},
		{"Id":%q,"Names":["/connect-proxy-web-%s"],"State":"running",%s}]`, pause, numbered(1), label, task, numbered(1), label)))
	mux.Handle("GET /containers/"+pause+"/json", say(200, `{"NetworkSettings":{"SandboxKey":"/first"}}`))
	return serveDocker(t, socket, mux)
}

// serveDocker answers on Docker's socket.
func serveDocker(t *testing.T, socket string, engine http.Handler) *httptest.Server {
	t.Helper()
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(engine)
	server.Listener = listener
	server.Start()
	t.Cleanup(func() { endServer(server) })
	return server
}

// endServer ends requests too that never answer.
func endServer(server *httptest.Server) {
	server.CloseClientConnections()
	server.Close()
}
