// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/weirmesh/weir/redirect"
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
	least := func(want int) func() error {
		return func() error {
			count, err := changed()
			if err == nil && count < want {
				err = fmt.Errorf("%d of %d workloads are changed", count, want)
			}
			return err
		}
	}
	all := len(f.list)
	start := time.Now()
	err := f.consul.call(ctx, http.MethodPut, "/v1/config", object{
		"Kind": "proxy-defaults", "Name": "global", "TransparentProxy": object{"OutboundListenerPort": outboundPort + 1},
		"Expose": object{"Paths": []object{{"Path": "/health", "LocalPathPort": 8080, "ListenerPort": exposedPort, "Protocol": "http"}}},
	}, nil)
	if err != nil {
		return err
	}
	if err := until(ctx, time.Minute, 100*time.Millisecond, least(max(1, all/20))); err != nil {
		return fmt.Errorf("wait for the first: %w", err)
	}
	if err := f.arrive(ctx, got); err != nil {
		return fmt.Errorf("start an allocation meanwhile: %w", err)
	}
	left, err := changed()
	if err != nil {
		return err
	}
	got["agent.left"] = float64(all - left)
	if err := until(ctx, 5*time.Minute, 250*time.Millisecond, least(all)); err != nil {
		return fmt.Errorf("wait for the last: %w", err)
	}
	got["agent.all"] = time.Since(start).Seconds()
	return nil
}

// arrive starts one more allocation, and measures from when Consul has its
// registration until that is in the kernel.
func (f *fleet) arrive(ctx context.Context, got figures) (err error) {
	a := &allocation{number: len(f.list), id: fmt.Sprintf("b412a0b1-e285-703a-01ba-%012d", len(f.list)), upstream: 9000}
	f.list = append(f.list, a)
	if err := f.place(ctx, a); err != nil {
		return err
	}
	start := time.Now()
	return until(ctx, time.Minute, 50*time.Millisecond, func() error {
		known, err := f.known(a)
		if err == nil && (!known.Complete || int(known.MeshConfig.InboundPort) != a.inbound()) {
			err = fmt.Errorf("it is not configured: %+v", known.MeshConfig)
		}
		got["agent.arrival"] = time.Since(start).Seconds()
		return err
	})
}
