// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/configfile"
)

// fakeEnterprise is no Consul Enterprise, which cannot be had without a licence.
// It only notes the namespace and the partition of what it is asked.
type fakeEnterprise struct {
	*httptest.Server
	mu    sync.Mutex
	asked map[string]string // by path: namespace and partition
}

func newFakeEnterprise(t *testing.T, fake *fakeConsul) *fakeEnterprise {
	t.Helper()
	f := &fakeEnterprise{asked: make(map[string]string)}
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		f.asked[r.URL.Path] = scope(r.URL.Query())
		f.mu.Unlock()
		fake.serve(w, r)
	}))
	t.Cleanup(f.Close)
	return f
}

func scope(query url.Values) string {
	return fmt.Sprintf("%s in %s", query.Get("ns"), query.Get("partition"))
}

// Every question names the agent's partition and the namespaces that it is to
// follow; one about a service names the service's own, which is the proxy's where
// an upstream names none.
func TestWatcherNamesPartitionAndNamespace(t *testing.T) {
	fake := newFakeConsul(t)
	fake.answers(say(200, `{
		"_nomad-task-b412a0b1-e285-703a-01ba-3d1b2e2228f7-group-g-web-1-sidecar-proxy": {
			"Kind": "connect-proxy", "Service": "web", "Port": 20001, "Namespace": "shop", "Partition": "red", "Proxy": {"Upstreams": [
				{"DestinationName": "near", "LocalBindPort": 9191},
				{"DestinationName": "far", "DestinationNamespace": "billing", "DestinationPartition": "blue", "LocalBindPort": 9292}]}},
		"_nomad-task-b412a0b1-e285-703a-01ba-3d1b2e2228f8-group-g-edge-1": {
			"Kind": "ingress-gateway", "Service": "edge", "Port": 8443, "Namespace": "doors", "Partition": "red"}}`))
	enterprise := newFakeEnterprise(t, fake)
	config := *configfile.DefaultConfig().Consul
	config.Address, config.Namespace, config.Partition = enterprise.URL, "*", "red"
	eventuallyKnown(t, runWatcher(t, config), "all questions", func(catalog.Snapshot) bool {
		enterprise.mu.Lock()
		defer enterprise.mu.Unlock()
		return len(enterprise.asked) == 8
	})
	want := map[string]string{
		"/v1/agent/services":              "* in red",
		"/v1/agent/self":                  "* in red",
		"/v1/catalog/node-services/node":  "* in red",
		"/v1/health/service/near":         "shop in red",
		"/v1/health/service/far":          "billing in blue",
		"/v1/discovery-chain/near":        "shop in red",
		"/v1/discovery-chain/far":         "billing in blue",
		"/v1/config/ingress-gateway/edge": "doors in red",
	}
	enterprise.mu.Lock()
	defer enterprise.mu.Unlock()
	if diff := cmp.Diff(want, enterprise.asked); diff != "" {
		t.Errorf("namespaces and partitions asked for (-want +got):\n%s", diff)
	}
}
