// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/store"
)

// exposedPort is the listener that a change of all proxies opens.
const exposedPort = 21500

// changeAll changes every proxy by one configuration entry in Consul, and starts
// another allocation while the agent is at it.
func (f *fleet) changeAll(ctx context.Context, got figures) error {
	changed := func() (count int, err error) {
		list, err := redirect.New(f.bench.paths).Records()
		for _, k := range list {
			if k.Complete && slices.Contains(k.MeshConfig.ExposedPorts, exposedPort) {
				count++
			}
		}
		return count, err
	}
	all := len(f.list)
	start := time.Now()
	if err := f.expose(ctx, exposedPort); err != nil {
		return err
	}
	if err := until(ctx, time.Minute, 100*time.Millisecond, atLeast(max(1, all/20), changed)); err != nil {
		return fmt.Errorf("wait for the first: %w", err)
	}
	if err := f.arrive(ctx, got); err != nil {
		return fmt.Errorf("start an allocation meanwhile: %w", err)
	}
	left, err := changed()
	if err != nil {
		return err
	}
	got["agent.left"] = float64(max(0, all-left)) // the new one is among those that were changed
	if err := until(ctx, 5*time.Minute, 250*time.Millisecond, atLeast(all, changed)); err != nil {
		return fmt.Errorf("wait for the last: %w", err)
	}
	got["agent.all"] = time.Since(start).Seconds()
	return nil
}

// atLeast is an error where fewer are changed.
func atLeast(want int, changed func() (int, error)) func() error {
	return func() error {
		count, err := changed()
		if err == nil && count < want {
			err = fmt.Errorf("%d of %d are changed", count, want)
		}
		return err
	}
}

// expose changes every proxy by one configuration entry in Consul.
func (f *fleet) expose(ctx context.Context, port int) error {
	return f.consul.call(ctx, http.MethodPut, "/v1/config", object{
		"Kind": "proxy-defaults", "Name": "global", "TransparentProxy": object{"OutboundListenerPort": outboundPort + 1},
		"Expose": object{"Paths": []object{{"Path": "/health", "LocalPathPort": 8080, "ListenerPort": port, "Protocol": "http"}}},
	}, nil)
}

// registered is what Consul says of a sidecar that is registered with it.
type registered struct {
	Proxy struct {
		Expose struct{ Paths []struct{ ListenerPort int } }
	}
}

func (r registered) exposes(port int) bool {
	paths := r.Proxy.Expose.Paths
	return len(paths) == 1 && paths[0].ListenerPort == port
}

// changeWithout changes every proxy once more while no agent runs, and registers another
// meanwhile: what it takes until Consul itself says so of all of them, and of the new one,
// is Consul's part of both.
func (f *fleet) changeWithout(ctx context.Context, got figures) error {
	const port = exposedPort + 1
	all := len(f.list)
	changed := func() (count int, err error) {
		var services map[string]registered
		err = f.consul.call(ctx, http.MethodGet, "/v1/agent/services", nil, &services)
		for _, s := range services {
			if s.exposes(port) {
				count++
			}
		}
		return count, err
	}
	start := time.Now()
	if err := f.expose(ctx, port); err != nil {
		return err
	}
	if err := until(ctx, time.Minute, 250*time.Millisecond, atLeast(max(1, all/20), changed)); err != nil {
		return fmt.Errorf("wait for the first: %w", err)
	}
	a := f.another()
	if err := f.register(ctx, a); err != nil {
		return err
	}
	arrived := time.Now()
	err := until(ctx, time.Minute, 20*time.Millisecond, func() error {
		var service registered
		err := f.consul.call(ctx, http.MethodGet, "/v1/agent/service/"+a.serviceID()+"-sidecar-proxy", nil, &service)
		if err == nil && !service.exposes(port) {
			err = fmt.Errorf("it is not configured: %+v", service)
		}
		got["agent.arrival.consul"] = time.Since(arrived).Seconds()
		return err
	})
	if err != nil {
		return fmt.Errorf("register a proxy meanwhile: %w", err)
	}
	err = until(ctx, 5*time.Minute, 250*time.Millisecond, atLeast(all, changed))
	got["agent.consul"] = time.Since(start).Seconds()
	return err
}

// another is one more allocation, which is not started yet.
func (f *fleet) another() *allocation {
	a := &allocation{number: len(f.list), id: fmt.Sprintf("b412a0b1-e285-703a-01ba-%012d", len(f.list)), upstream: 9000}
	f.list = append(f.list, a)
	return a
}

// arrive starts one more allocation, and measures from when Consul has its
// registration until that is in the kernel.
func (f *fleet) arrive(ctx context.Context, got figures) (err error) {
	a := f.another()
	if err := f.place(ctx, a); err != nil {
		return err
	}
	start := time.Now()
	return until(ctx, time.Minute, 50*time.Millisecond, func() error {
		known, err := f.known(a)
		if err == nil && (known.State != store.Complete || int(known.MeshConfig.InboundPort) != a.inbound()) {
			err = fmt.Errorf("it is not configured: %+v", known.MeshConfig)
		}
		got["agent.arrival"] = time.Since(start).Seconds()
		return err
	})
}
