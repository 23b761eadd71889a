// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/weirmesh/weir/test/spawn"
)

// clients reach the node's services from outside.
type clients struct {
	nomad, server, consul api
	docker                *http.Client
}

func newClients(n *Node) *clients {
	// Looked up for each connection: a reboot changes them.
	inside := func(ctx context.Context, network, address string) (net.Conn, error) {
		return spawn.Dialer(n.machine.net.Path)(ctx, network, address)
	}
	client := func(base, token string) api {
		if !n.options.Secure {
			token = ""
		}
		return api{base: base, token: token, client: &http.Client{Timeout: 15 * time.Second, Transport: &http.Transport{
			DisableKeepAlives: true, DialContext: inside, TLSClientConfig: n.clientTLS(),
		}}}
	}
	scheme, consul := "http", "8500"
	if n.options.Secure {
		scheme, consul = "https", "8501"
	}
	at := func(port, token string) api { return client(scheme+"://127.0.0.1:"+port, token) }
	return &clients{
		nomad: at("4646", "X-Nomad-Token"), server: at("14646", "X-Nomad-Token"), consul: at(consul, "X-Consul-Token"),
		docker: &http.Client{Timeout: 60 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", n.Path("/run/docker.sock"))
		}}},
	}
}

func (c *clients) dockerCall(method, path string, answer any) error {
	return api{base: "http://docker", client: c.docker}.call(method, path, nil, answer)
}

// api is an HTTP API that speaks JSON.
type api struct {
	base   string
	client *http.Client
	token  string // the header for it; empty: none is asked for
}

func (a api) get(path string, answer any) error { return a.call(http.MethodGet, path, nil, answer) }

func (a api) call(method, path string, value, answer any) error {
	var body io.Reader
	if value != nil {
		data, err := json.Marshal(value)
		if err != nil {
			return fmt.Errorf("%s %s: %w", method, path, err)
		}
		body = bytes.NewReader(data)
	}
	request, err := http.NewRequest(method, a.base+path, body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if a.token != "" {
		request.Header.Set(a.token, managementToken)
	}
	response, err := a.client.Do(request)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if response.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %s: %s", method, path, response.Status, strings.TrimSpace(string(text[:min(len(text), 2000)])))
	}
	if answer == nil {
		return nil
	}
	if raw, ok := answer.(*string); ok {
		*raw = string(text)
		return nil
	}
	if err := json.Unmarshal(text, answer); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}

// NomadGet reads from the client's API, ConsulGet from Consul's.
func (n *Node) NomadGet(path string, answer any) {
	n.tb.Helper()
	if err := n.api.nomad.get(path, answer); err != nil {
		n.tb.Fatal(err)
	}
}

// ConsulGet reads from Consul's API.
func (n *Node) ConsulGet(path string, answer any) {
	n.tb.Helper()
	if err := n.api.consul.get(path, answer); err != nil {
		n.tb.Fatal(err)
	}
}

// A criticalCheck is one that fails in the eyes of Consul's catalog: what it is of has no
// connections from anybody.
type criticalCheck struct{ Name, ServiceID, ServiceName, Output string }

func (c criticalCheck) String() string {
	return fmt.Sprintf("%s of %s is critical: %s", c.Name, c.ServiceID, c.Output)
}

// criticalChecks are all of them.
func (a api) criticalChecks() (list []criticalCheck, err error) {
	err = a.get("/v1/health/state/critical", &list)
	return list, err
}

// ConsulPut writes to Consul's API.
func (n *Node) ConsulPut(path string, value any) {
	n.tb.Helper()
	if err := n.api.consul.call(http.MethodPut, path, value, nil); err != nil {
		n.tb.Fatal(err)
	}
}

// Intend says whether source may talk to destination ("allow" or "deny"), until
// the test ends.
func (n *Node) Intend(source, destination, action string) {
	n.tb.Helper()
	path := fmt.Sprintf("/v1/connect/intentions/exact?source=%s&destination=%s", source, destination)
	n.ConsulPut(path, map[string]string{"Action": action, "SourceType": "consul"})
	n.tb.Cleanup(func() {
		if err := n.api.consul.call(http.MethodDelete, path, nil, nil); err != nil {
			n.tb.Errorf("take back intention: %v", err)
		}
	})
}

// ConfigEntry writes one of Consul's config entries, until the test ends.
func (n *Node) ConfigEntry(entry map[string]any) {
	n.tb.Helper()
	n.ConsulPut("/v1/config", entry)
	name, named := entry["Name"].(string)
	if !named {
		name = entry["Kind"].(string) // there is one of that kind, and it must not be named
	}
	n.DropConfigEntry(entry["Kind"].(string), name)
}

// DropConfigEntry takes a config entry back when the test ends. Nomad writes those
// of gateways, and leaves them.
func (n *Node) DropConfigEntry(kind, name string) {
	n.tb.Cleanup(func() {
		if err := n.api.consul.call(http.MethodDelete, "/v1/config/"+kind+"/"+name, nil, nil); err != nil {
			n.tb.Errorf("take back config entry: %v", err)
		}
	})
}
