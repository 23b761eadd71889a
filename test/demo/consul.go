// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/weirmesh/weir/test/spawn"
)

// consul is a real Consul server in the node's namespace, which is the node's
// local agent too. It is reached by Unix sockets, as Nomad's proxies reach it.
type consul struct {
	*api.Client
	binary  string
	http    string // address of its API
	xds     string // ... and of what configures Envoy
	process *spawn.Process
}

// consulDir is what proxies of any user reach the sockets through.
var consulDir = filepath.Join(runDir, "consul")

func startConsul(ctx context.Context, n *node, binary string) (*consul, error) {
	if err := os.Mkdir(consulDir, 0o755); err != nil {
		return nil, fmt.Errorf("start consul: %w", err)
	}
	file := func(name string) string { return filepath.Join(consulDir, name) }
	c := &consul{binary: binary, http: "unix://" + file("http.sock"), xds: "unix://" + file("xds.sock")}
	settings, err := json.Marshal(map[string]any{
		"node_name": "demo", "server": true, "bootstrap_expect": 1, "log_level": "warn", "data_dir": file("data"),
		"bind_addr": gateway, "client_addr": "127.0.0.1",
		"addresses": map[string]any{"http": c.http, "grpc": c.xds}, "unix_sockets": map[string]any{"mode": "0777"},
		"ports":                map[string]any{"grpc": 8502, "grpc_tls": -1, "dns": -1, "serf_wan": -1},
		"connect":              map[string]any{"enabled": true},
		"performance":          map[string]any{"raft_multiplier": 1},
		"disable_update_check": true,
	})
	if err == nil {
		err = os.WriteFile(file("consul.json"), settings, 0o600)
	}
	if err != nil {
		return nil, fmt.Errorf("start consul: %w", err)
	}
	if c.Client, err = api.NewClient(&api.Config{Address: c.http}); err != nil {
		return nil, fmt.Errorf("start consul: %w", err)
	}
	c.process, err = n.start("consul", spawn.Spec{
		Binary: binary, Args: []string{"agent", "-config-file", file("consul.json")}, NetNS: n.netns,
	})
	if err != nil {
		return nil, err
	}
	return c, await(ctx, "consul to be ready", c.process, func() error {
		nodes, _, err := c.Catalog().Nodes(nil)
		if err == nil && len(nodes) == 0 {
			err = errors.New("no node in its catalog yet")
		}
		return err
	})
}

// version is the first line of what it says of itself.
func (c *consul) version() (string, error) {
	text, err := spawn.Run(spawn.Spec{Binary: c.binary, Args: []string{"version"}})
	line, _, _ := strings.Cut(text, "\n")
	return line, err
}

// register registers the allocation's service and its sidecar, under the IDs
// that Nomad gives. The listener for what comes in is at inbound.
func (c *consul) register(a *allocation, inbound int) error {
	err := c.Agent().ServiceRegister(&api.AgentServiceRegistration{
		ID: a.serviceID(), Name: a.group, Address: a.address.Addr().String(), Port: servicePort,
		Connect: &api.AgentServiceConnect{SidecarService: &api.AgentServiceRegistration{
			Address: a.address.Addr().String(), Port: inbound, Checks: api.AgentServiceChecks{},
			Proxy: &api.AgentServiceConnectProxyConfig{
				Mode: api.ProxyModeTransparent, LocalServiceAddress: "127.0.0.1", LocalServicePort: servicePort,
				TransparentProxy: &api.TransparentProxyConfig{OutboundListenerPort: outboundPort},
			},
		}},
	})
	if err != nil {
		return fmt.Errorf("register %s: %w", a.group, err)
	}
	return nil
}

// bootstrap is what Nomad starts the sidecar's Envoy with.
func (c *consul) bootstrap(a *allocation) (string, error) {
	return spawn.Run(spawn.Spec{Binary: c.binary, Args: []string{
		"connect", "envoy", "-bootstrap", "-sidecar-for", a.serviceID(), "-admin-bind", adminAddress,
		"-http-addr", c.http, "-grpc-addr", c.xds,
	}})
}

// virtualIP is the address by which the mesh knows the service.
func (c *consul) virtualIP(ctx context.Context, service string) (addr netip.Addr, err error) {
	err = await(ctx, "the virtual IP of "+service, c.process, func() error {
		instances, _, err := c.Health().Connect(service, "", false, nil)
		if err != nil {
			return err
		}
		if len(instances) == 0 {
			return errors.New("it is not registered yet")
		}
		addr, err = netip.ParseAddr(instances[0].Service.TaggedAddresses["consul-virtual"].Address)
		return err
	})
	return addr, err
}

// await asks until there is no error, or the process has ended.
func await(ctx context.Context, what string, process *spawn.Process, ask func() error) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		last := ask()
		if last == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("await %s: %w; last answer: %w", what, ctx.Err(), last)
		case <-process.Done():
			return fmt.Errorf("await %s: a process it needs ended: %w", what, process.Wait())
		case <-tick.C:
		}
	}
}
