// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/weirmesh/weir/redirect"
)

// scale measures whether a node that is full is as fast as one that is empty.
func (b *bench) scale() measurement {
	crowd := &crowd{bench: b}
	variants := make([]string, len(b.size.scale))
	for i, count := range b.size.scale {
		variants[i] = workloads(count)
	}
	return measurement{
		name: "scale", about: fmt.Sprintf("a node of up to %d workloads", slices.Max(b.size.scale)), rounds: b.size.whole,
		variants: variants,
		rows: []row{
			{ID: "scale.connect", Name: "connect p50, one core", Unit: "us", target: flat(0.05, variants)},
			{ID: "scale.add", Name: "ADD in process", Unit: "ms", target: flat(0.2, variants)},
			{ID: "scale.again", Name: "the same ADD again, which changes nothing, as CHECK does", Unit: "ms", target: flat(0.2, variants)},
			{ID: "scale.del", Name: "DEL in process", Unit: "ms", target: flat(0.2, variants)},
		},
		begin: b.load, run: crowd.measure,
		end: func() error { return errors.Join(crowd.resize(0), b.unload()) },
	}
}

// scaleNote says what the figures of a full node are worth.
const scaleNote = `
Each column is the same node with so many redirected namespaces, the measured one included, which is a fresh one each
time. The columns take turns in random order, so that what else the machine does falls on all of them; each sample is
the median of several connections of thousands, or of several ADDs. "to reach": how much more the worst column takes
than the first.
`

func workloads(count int) string {
	if count == 1 {
		return "1 workload"
	}
	return strconv.Itoa(count) + " workloads"
}

// isScale tells the columns of scale from all others.
func isScale(variant string) bool {
	return strings.HasSuffix(variant, " workload") || strings.HasSuffix(variant, " workloads")
}

// flat: no column takes more than the first by so much, by the median of the rounds.
func flat(share float64, variants []string) func(row) verdict {
	return func(r row) verdict {
		worst, at := 0.0, ""
		for _, variant := range variants[1:] {
			if ratio := summarize(ratios(r.Samples[variant], r.Samples[variants[0]])).Median; ratio > worst {
				worst, at = ratio, variant
			}
		}
		return verdict{
			Goal:    fmt.Sprintf("at most x%.2f", 1+share),
			Figure:  fmt.Sprintf("x%.2f at %s", worst, at),
			Reached: worst <= 1+share,
		}
	}
}

// A crowd is the workloads beside the measured one.
type crowd struct {
	bench *bench
	sites []*site
}

// resize adds workloads, or removes the newest.
func (c *crowd) resize(count int) error {
	for len(c.sites) > count {
		last := c.sites[len(c.sites)-1]
		c.sites = c.sites[:len(c.sites)-1]
		if err := errors.Join(redirect.New(c.bench.paths).Remove(key(last)), last.close()); err != nil {
			return fmt.Errorf("remove workload: %w", err)
		}
	}
	for len(c.sites) < count {
		s, err := newBareSite(c.bench.netns, c.bench.nextName(), netip.MustParseAddr(insideAddr))
		if err != nil {
			return err
		}
		c.sites = append(c.sites, s)
		if err := redirect.New(c.bench.paths).Add(attachment(s)); err != nil {
			return fmt.Errorf("add workload: %w", err)
		}
	}
	return nil
}

func (c *crowd) measure(ctx context.Context, column string) (figures, error) {
	b := c.bench
	count, err := strconv.Atoi(strings.Fields(column)[0])
	if err != nil {
		return nil, err
	}
	if err := errors.Join(c.resize(count-1), b.settle(ctx)); err != nil {
		return nil, err
	}
	ours := variant{ // the node is loaded already
		name: weir, outbound: addrPort(remote), inbound: addrPort(service), redirect: true,
		install: func(s *site) error { return redirect.New(b.paths).Add(attachment(s)) },
		remove:  func(s *site) error { return redirect.New(b.paths).Remove(key(s)) },
	}
	one := b.cpus[:1]
	t := trial{client: dialSpec{Task: taskConnect, Count: b.size.connections, Warmup: 200}, clientCPUs: one, proxyCPUs: one}
	var connect, add, again, remove []float64
	for range b.size.trials {
		got, err := b.try(ctx, ours, t)
		if err != nil {
			return nil, err
		}
		connect = append(connect, micros(got.P50))
	}
	for range b.size.adds {
		took, err := c.addOnce()
		if err != nil {
			return nil, err
		}
		add, again, remove = append(add, took[0]), append(again, took[1]), append(remove, took[2])
	}
	return figures{
		"scale.connect": summarize(connect).Median, "scale.add": summarize(add).Median,
		"scale.again": summarize(again).Median, "scale.del": summarize(remove).Median,
	}, nil
}

// addOnce is the time of ADD, of the same again, and of DEL of a fresh namespace.
func (c *crowd) addOnce() (took [3]float64, err error) {
	b := c.bench
	s, err := newBareSite(b.netns, b.nextName(), netip.MustParseAddr(insideAddr))
	if err != nil {
		return took, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	runtime.GC()
	node := redirect.New(b.paths)
	for i, step := range []func() error{
		func() error { return node.Add(attachment(s)) },
		func() error { return node.Add(attachment(s)) },
		func() error { return node.Remove(key(s)) },
	} {
		start := time.Now()
		if err := step(); err != nil {
			return took, err
		}
		took[i] = millis(time.Since(start))
	}
	return took, nil
}
