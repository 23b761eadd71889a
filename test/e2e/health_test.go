// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"testing"

	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// Consul's own checks go on in enforce: of the proxy, as Nomad registers it, of
// the application through an expose path, and through the port that Consul opens
// for a check by itself. One that dials the application past the proxy fails, by
// which it is known that the guard is in the way of Consul's checks.
func TestHealthChecksOfConsul(t *testing.T) {
	n := newConsulNode(t)
	n.runAgent()
	check := func(name, kind, target string) object {
		return object{"CheckID": name, "Name": name, kind: target, "Interval": "1s", "Timeout": "2s"}
	}
	const (
		sidecar, exposedPath, exposedCheck, past = "Connect Sidecar Listening", "exposed path", "exposed check", "past the proxy"
	)
	web, apiAlloc := n.allocate(""), n.allocate("")
	// Consul's own listener for a check takes nobody but the node's own address.
	ip(t, n.outside, "route replace 10.88.2.0/24 dev veth2 src 10.88.0.1")
	webHits, apiHits := web.serveHealth(t, "0.0.0.0:8080"), apiAlloc.serveHealth(t, "127.0.0.1:8080")
	web.startEnvoy(web.register("web", object{
		"Port": 20001, "Checks": []object{check(sidecar, "TCP", web.at(20001).String())},
		"Proxy": object{"Expose": object{"Paths": []object{{"Path": "/health", "ListenerPort": 21400, "LocalPathPort": 8080, "Protocol": "http"}}}},
	}, check(exposedPath, "HTTP", fmt.Sprintf("http://%s/health", web.at(21400))), check(past, "TCP", web.at(8080).String())))
	apiAlloc.startEnvoy(apiAlloc.register("api", object{
		"Port": 20002, "Proxy": object{"Expose": object{"Checks": true}},
	}, check(exposedCheck, "HTTP", fmt.Sprintf("http://%s/health", apiAlloc.at(8080)))))

	hits := func() map[string]int {
		return map[string]int{sidecar: web.stat(t, "downstream_cx_total"), exposedPath: int(webHits.Load()), exposedCheck: int(apiHits.Load())}
	}
	status := func(name string) (status, output string) {
		var list map[string]struct{ Status, Output string }
		n.consul.Get("/v1/agent/checks", &list)
		return list[name].Status, list[name].Output
	}
	become := func(name, want string) {
		t.Helper()
		test.Eventually(t, func() error {
			if got, output := status(name); got != want {
				return fmt.Errorf("it is %s: %s", got, output)
			}
			return nil
		}, fmt.Sprintf("check %q to be %s", name, want))
	}
	for _, name := range []string{sidecar, exposedPath, exposedCheck, past} {
		become(name, "passing")
	}

	n.stop()
	n.config.Guard.Default = string(workload.GuardEnforce)
	n.runAgent()
	web.wantGuard(t, workload.GuardEnforce)
	apiAlloc.wantGuard(t, workload.GuardEnforce)
	before := hits()
	test.Eventually(t, func() error {
		more := 0
		for name, count := range hits() {
			if got, output := status(name); got != "passing" {
				t.Fatalf("check %q is %s in enforce: %s", name, got, output)
			}
			if count >= before[name]+3 {
				more++
			}
		}
		if more < len(before) {
			return fmt.Errorf("hits were %v and are %v, want 3 more of each", before, hits())
		}
		return nil
	}, "more checks to arrive in enforce")
	become(past, "critical")
}

// serveHealth runs an application in the allocation, and counts how often it was
// asked for its health.
func (a *meshAlloc) serveHealth(t *testing.T, addr string) *atomic.Int64 {
	t.Helper()
	var listener net.Listener
	var err error
	a.ns.Do(func() { listener, err = net.Listen("tcp4", addr) })
	if err != nil {
		t.Fatal(err)
	}
	hits := new(atomic.Int64)
	mux := http.NewServeMux()
	mux.HandleFunc("/health", func(http.ResponseWriter, *http.Request) { hits.Add(1) })
	server := &http.Server{Handler: mux}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	t.Cleanup(func() {
		if err := errors.Join(server.Close(), <-done); !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("application ended: %v", err)
		}
	})
	return hits
}
