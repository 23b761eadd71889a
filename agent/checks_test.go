// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/catalog"
)

// checked is a registration that lets Consul open a port for each of its checks.
func checked(allocation, service string) string {
	return fmt.Sprintf(`"_nomad-task-%s-group-g-web-1-sidecar-proxy": {"Kind": "connect-proxy", "Port": 20001,
		"Proxy": {"DestinationServiceID": %q, "Expose": {"Checks": true}}}`, allocation, service)
}

// A health check must not fail behind a guard because its port is asked for late:
// Consul is asked as soon as a service appears whose checks are exposed, and
// again soon while it has not opened their ports.
func TestWatcherAsksForExposedChecksOfANewService(t *testing.T) {
	t.Parallel()
	fake := newFakeConsul(t)
	var checks atomic.Value
	checks.Store(`{"a:1": {"ServiceID": "a", "ExposedPort": 21500}}`)
	fake.mu.Lock()
	fake.checks = func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, checks.Load()) }
	fake.mu.Unlock()
	fake.answers(say(200, "{"+checked(exampleAlloc, "a")+"}"))
	watcher := fake.follow(t)
	eventuallyKnown(t, watcher, "the first service's port", func(v catalog.Snapshot) bool { return slices.Equal(v.Facts.CheckPorts["a"], []uint16{21500}) })

	second := strings.Replace(exampleAlloc, "b412a0b1", "b412a0b2", 1)
	fake.answers(say(200, "{"+checked(exampleAlloc, "a")+","+checked(second, "b")+"}"))
	watcher.Wake()
	began := time.Now()
	asked := fake.times("/v1/agent/checks")
	eventuallyKnown(t, watcher, "a question for the second service", func(catalog.Snapshot) bool { return fake.times("/v1/agent/checks") > asked })
	checks.Store(`{"a:1": {"ServiceID": "a", "ExposedPort": 21500}, "b:1": {"ServiceID": "b", "ExposedPort": 21501}}`)
	got := eventuallyKnown(t, watcher, "the second service's port", func(v catalog.Snapshot) bool { return len(v.Facts.CheckPorts["b"]) > 0 })
	if ports := got.Facts.CheckPorts["b"]; !slices.Equal(ports, []uint16{21501}) {
		t.Errorf("ports = %v, want 21501", ports)
	}
	if took := time.Since(began); took > catalog.ListenerInterval/2 {
		t.Errorf("known after %s, want at most %s", took, catalog.ListenerInterval/2)
	}
}
