// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"errors"
	"net/netip"
)

// unrelated measures what Weir costs a process that it has nothing to do with,
// in a namespace that is no workload. The programs sit at the root of all
// cgroups: everybody pays for their first test.
func (b *bench) unrelated() measurement {
	m := measurement{
		name: "foreign", about: "sockets of others, Weir loaded or not", rounds: b.size.rounds,
		variants: []string{direct, directAgain, weir},
		rows: []row{
			{ID: "foreign.p50", Name: "foreign socket: connect p50", Unit: "us"},
			{ID: "foreign.cpu", Name: "foreign socket: CPU per connection", Unit: "us"},
			{ID: "foreign.getsockopt", Name: "foreign socket: getsockopt(SO_ERROR)", Unit: "ns"},
			{ID: "foreign.getpeername", Name: "foreign socket: getpeername", Unit: "ns"},
		},
		run: b.unrelatedOnce,
	}
	for i := range m.rows {
		m.rows[i].Floor = direct
	}
	return m
}

func (b *bench) unrelatedOnce(ctx context.Context, name string) (got figures, err error) {
	s, err := b.newSite()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.close(), b.settle(ctx)) }()
	if name == weir {
		if err := b.load(); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, b.unload()) }()
	}
	listener := addrPort("127.0.0.1:9000")
	at := place{netns: s.inside, uid: taskUID, cgroup: b.foreign, cpus: b.cpus[:1]}
	try := func(client dialSpec) (outcome, error) {
		client.To = listener
		result, served, err := b.exchange(ctx, serveSpec{Listen: []netip.AddrPort{listener}, Origin: listener}, at, client, at)
		if err != nil {
			return result, err
		}
		return result, checkOrigins(served, listener, false)
	}
	connects, err := try(dialSpec{Task: taskConnect, Count: b.size.connections, Warmup: 200})
	if err != nil {
		return nil, err
	}
	calls, err := try(dialSpec{Task: taskCalls, Count: b.size.calls})
	if err != nil {
		return nil, err
	}
	return figures{
		"foreign.p50":         micros(connects.P50),
		"foreign.cpu":         micros(connects.CPU) / float64(connects.Done),
		"foreign.getsockopt":  calls.GetSockOpt,
		"foreign.getpeername": calls.GetPeer,
	}, nil
}
