// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"errors"
	"net/netip"
	"path/filepath"

	"github.com/weirmesh/weir/test/bench/limit"
)

// unrelated measures what Weir costs a process that it has nothing to do with,
// in a namespace that is no workload. The programs sit at the root of all
// cgroups: everybody pays for their first test, and what the kernel takes for
// having any program there, which is all that the limit has.
func (b *bench) unrelated() measurement {
	m := measurement{
		name: "foreign", about: "sockets of others, Weir loaded or not", rounds: b.size.rounds,
		variants: []string{direct, directAgain, least, weir},
		rows: []row{
			{ID: "foreign.p50", Name: "foreign socket: connect p50", Unit: "us"},
			{ID: "foreign.cpu", Name: "foreign socket: CPU per connection", Unit: "us"},
			{ID: "foreign.getsockopt", Name: "foreign socket: getsockopt(SO_ERROR)", Unit: "ns"},
			{ID: "foreign.setsockopt", Name: "foreign socket: setsockopt(TCP_NODELAY)", Unit: "ns"},
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
	empty := limit.Config{Cgroup: filepath.Dir(b.foreign)}
	if hooks, has := map[string][2]func() error{weir: {b.load, b.unload}, least: {empty.AttachEmpty, empty.Close}}[name]; has {
		if err := hooks[0](); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, hooks[1]()) }()
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
		"foreign.getsockopt":  calls.Calls["getsockopt"],
		"foreign.setsockopt":  calls.Calls["setsockopt"],
		"foreign.getpeername": calls.Calls["getpeername"],
	}, nil
}
