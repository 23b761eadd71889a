// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"fmt"
	"time"
)

// traffic are the measurements of what goes through the local hop.
func (b *bench) traffic() []measurement {
	first, last := b.cpus[:1], b.cpus[len(b.cpus)-1:]
	connect := dialSpec{Task: taskConnect, Count: b.size.connections, Warmup: 200}
	parallel := dialSpec{Task: taskConnect, Count: b.size.parallel, Threads: 4, Warmup: 200}
	return []measurement{
		b.connects("connect", "connect, 1 byte, close; both ends on one core", "one core",
			trial{client: connect, clientCPUs: first, proxyCPUs: first}, addedCost(0.12, 2.2), addedCost(0.15, 0)),
		b.connects("connect2", "connect, 1 byte, close; ends on two cores", "two cores",
			trial{client: connect, clientCPUs: first, proxyCPUs: last}, addedCost(0.25, 2.2), addedCost(0.15, 0)),
		b.compare("rate", "connections/s of 4 client threads", b.size.rounds,
			[]row{{ID: "rate", Name: "connections/s, 4 threads", Unit: "/s"}},
			trial{client: parallel},
			func(o outcome) figures { return figures{"rate": perSecond(o.Done, o.Elapsed)} }),
		b.churn(first, last),
		b.compare("stream", "one stream, writes of 128 KiB", b.size.rounds,
			[]row{{ID: "stream", Name: "stream, writes of 128 KiB", Unit: "Gbit/s", target: asTheFloor}},
			trial{sink: true, client: dialSpec{Task: taskStream, Size: 128 << 10, Duration: b.size.flow}, clientCPUs: first, proxyCPUs: last},
			func(o outcome) figures { return figures{"stream": float64(o.Bytes) * 8 / o.Elapsed.Seconds() / 1e9} }),
		b.requests("requests", 1, first, first),
		b.requests("requests16", 16, first, last),
		b.connects("inbound", "inbound over veth: connect, 1 byte, close; one core", "inbound",
			trial{inbound: true, client: connect, clientCPUs: first, proxyCPUs: first}, nil, nil),
	}
}

// compare measures all variants with one kind of trial.
func (b *bench) compare(name, about string, rounds int, rows []row, t trial, read func(outcome) figures) measurement {
	byName := map[string]variant{}
	m := measurement{name: name, about: about, rounds: rounds, rows: rows}
	for _, v := range b.variants() {
		byName[v.name] = v
		m.variants = append(m.variants, v.name)
	}
	for i := range rows {
		rows[i].Floor = direct
	}
	m.run = func(ctx context.Context, name string) (figures, error) {
		got, err := b.try(ctx, byName[name], t)
		if err != nil {
			return nil, err
		}
		return read(got), nil
	}
	return m
}

func (b *bench) connects(name, about, where string, t trial, latency, work func(row) verdict) measurement {
	p50, p99, cpu := name+".p50", name+".p99", name+".cpu"
	rows := []row{
		{ID: p50, Name: "connect p50, " + where, Unit: "us", target: latency},
		{ID: p99, Name: "connect p99, " + where, Unit: "us"},
		{ID: cpu, Name: "CPU per connection, " + where, Unit: "us", target: work},
	}
	return b.compare(name, about, b.size.rounds, rows, t, func(o outcome) figures {
		return figures{
			p50: micros(o.P50), p99: micros(o.P99),
			cpu: micros(o.CPU) / float64(o.Done),
		}
	})
}

func (b *bench) requests(name string, connections int, client, proxy []int) measurement {
	where := fmt.Sprintf("requests/s, 1 KiB, %d connections", connections)
	if connections == 1 {
		where = "requests/s, 1 KiB, 1 connection"
	}
	spec := dialSpec{Task: taskRequests, Size: 1 << 10, Conns: connections, Duration: b.size.flow}
	return b.compare(name, where, b.size.rounds,
		[]row{{ID: name, Name: where, Unit: "/s", target: asTheFloor}},
		trial{client: spec, clientCPUs: client, proxyCPUs: proxy},
		func(o outcome) figures { return figures{name: perSecond(o.Done, o.Elapsed)} })
}

func (b *bench) churn(client, proxy []int) measurement {
	count, block := b.size.churn, b.size.block
	spec := dialSpec{Task: taskChurn, Count: count, Block: block, Duration: b.size.patience}
	return b.compare("churn", fmt.Sprintf("%d connections to one destination", count), b.size.heavy,
		[]row{
			{ID: "churn.first", Name: fmt.Sprintf("churn: first %d of %d", block, count), Unit: "/s"},
			{ID: "churn.last", Name: fmt.Sprintf("churn: last %d of %d", block, count), Unit: "/s", target: asTheFloor},
			{ID: "churn.kept", Name: "churn: last rate / first rate"},
			{ID: "churn.done", Name: fmt.Sprintf("churn: connections within %.0f s", b.size.patience.Seconds())},
		},
		trial{client: spec, clientCPUs: client, proxyCPUs: proxy},
		func(o outcome) figures {
			first, last := o.Rates[0], o.Rates[len(o.Rates)-1]
			return figures{"churn.first": first, "churn.last": last, "churn.kept": last / first, "churn.done": float64(o.Done)}
		})
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

func perSecond(count int, took time.Duration) float64 { return float64(count) / took.Seconds() }
