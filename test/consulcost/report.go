// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"time"
)

// A sample is what a while cost: all counters are sums.
type sample struct {
	questions, bytes       float64 // of the nodes to their local agents
	requests, sent         float64 // of anybody to the server
	server, local, seconds float64
}

func (a sample) minus(b sample) sample {
	return sample{
		a.questions - b.questions, a.bytes - b.bytes, a.requests - b.requests, a.sent - b.sent,
		a.server - b.server, a.local - b.local, a.seconds - b.seconds,
	}
}

type column struct {
	name   string
	phases [2]sample // calm, changing
}

// phases measures a calm while and one in which services come and go. count is that
// of the nodes; nil: there are none.
func (c *cluster) phases(ctx context.Context, count func() (told, error)) (measured [2]sample, err error) {
	for i := range measured {
		before, err := c.sample(ctx, count)
		if err != nil {
			return measured, err
		}
		if err := c.pass(ctx, time.Duration(c.secs)*time.Second, i == 1); err != nil {
			return measured, err
		}
		after, err := c.sample(ctx, count)
		if err != nil {
			return measured, err
		}
		measured[i] = after.minus(before)
	}
	return measured, nil
}

func (c *cluster) sample(ctx context.Context, count func() (told, error)) (s sample, err error) {
	s.seconds = float64(time.Now().UnixMilli()) / 1000
	if count != nil {
		answer, err := count()
		if err != nil {
			return s, err
		}
		s.questions, s.bytes = float64(answer.Questions), float64(answer.Bytes)
	}
	if s.server, err = c.server.cpu(); err != nil {
		return s, err
	}
	for _, client := range c.clients {
		taken, err := client.cpu()
		if err != nil {
			return s, err
		}
		s.local += taken
	}
	if s.requests, err = c.server.requests(ctx); err != nil {
		return s, err
	}
	s.sent, err = c.server.sent(ctx)
	return s, err
}

// report prints a table of what a node costs a minute, without what Consul does by itself.
func report(w io.Writer, o options, nobody [2]sample, columns []column) {
	fmt.Fprintf(w, "%d nodes with %d upstreams each, %d services, %d seconds each\n\n|", o.nodes, o.own, o.services, o.secs)
	for _, c := range columns {
		fmt.Fprintf(w, " | %s", c.name)
	}
	fmt.Fprintf(w, " |\n|---|")
	for range columns {
		fmt.Fprint(w, "---|")
	}
	fmt.Fprintln(w)
	for i, phase := range []string{"calm", "one service a second comes or goes"} {
		for _, row := range []struct {
			name, unit string
			scale      float64
			of         func(sample) float64
		}{
			{"questions to the local agent", "", 1, func(s sample) float64 { return s.questions }},
			{"bytes of its answers", " KiB", 1.0 / 1024, func(s sample) float64 { return s.bytes }},
			{"requests to the servers", "", 1, func(s sample) float64 { return s.requests }},
			{"bytes from the servers", " KiB", 1.0 / 1024, func(s sample) float64 { return s.sent }},
			{"the servers' CPU", " ms", 1000, func(s sample) float64 { return s.server }},
			{"the local agent's CPU", " ms", 1000, func(s sample) float64 { return s.local }},
		} {
			fmt.Fprintf(w, "| %s: %s |", phase, row.name)
			alone := row.of(nobody[i]) / nobody[i].seconds
			for _, c := range columns {
				s := c.phases[i]
				fmt.Fprintf(w, " %.3g%s |", (row.of(s)/s.seconds-alone)*60/float64(o.nodes)*row.scale, row.unit)
			}
			fmt.Fprintln(w)
		}
	}
	for i, phase := range []string{"calm", "changing"} {
		fmt.Fprintf(w, "\nwithout nodes, %s: %.0f requests a minute, %.0f KiB, CPU of the server %.2f %% of a core\n", phase,
			nobody[i].requests/nobody[i].seconds*60, nobody[i].sent/1024/nobody[i].seconds*60, 100*nobody[i].server/nobody[i].seconds)
	}
}
