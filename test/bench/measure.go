// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/test/bench/limit"
	"github.com/weirmesh/weir/test/bench/peer"
)

// A measurement fills some rows of the table: every round it measures each of
// its variants once, in an order drawn anew.
type measurement struct {
	name     string // as -only names it
	about    string // for the progress line
	rounds   int
	variants []string
	rows     []row
	begin    func() error // nil: nothing to do
	end      func() error // nil: nothing to do
	run      func(ctx context.Context, variant string) (figures, error)
}

// figures are one variant's results of one round, by the IDs of their rows.
type figures map[string]float64

// A bench is one run: the machine's parts that it made, and what it measured.
type bench struct {
	size     sizes
	paths    store.Paths
	netns    string     // where namespaces are mounted
	program  string     // this program, executable for everybody
	engine   string     // the program of ./engine
	nftables string     // the program of ./nftables
	peer     *peer.Peer // that program, running
	limit    *limit.Config
	plugin   string // weir-cni
	weir     string // weir
	consul   string // consul; "": there is none
	plugins  string // directory of the reference CNI plugins
	before   string // directory of an earlier revision's programs; empty: none
	task     string // cgroup of clients
	proxy    string // cgroup of servers
	foreign  string // cgroup of processes that have nothing to do with Weir
	cpus     []int
	made     int // sites so far
	progress io.Writer
}

// sizes say how much is measured.
type sizes struct {
	rounds      int // of the comparisons
	heavy       int // rounds of what takes long: churn, memory, the first ADD
	whole       int // rounds of what takes minutes: a storm, a full node
	setups      int // rounds of the set-up of single workloads
	connections int // on one thread; few beside the local ports, so that connect finds one at once
	parallel    int // on each of four threads; the same holds for their sum
	churn       int
	block       int // of churn
	patience    time.Duration
	flow        time.Duration // of streams and requests
	workloads   int           // whose memory is measured together
	engines     int           // the same of Consul's engine, which needs much more time for each
	calls       int           // of getsockopt, setsockopt and getpeername
	settle      time.Duration // at most, after each measurement
	storm       int           // allocations that start at once
	proxies     int           // of the agent's node
	rest        time.Duration // of the agent after its start
	minutes     int           // of calm
	minute      time.Duration // how long each of those is
	changes     int           // in Consul
	asked       int           // how often each command is run
	scale       []int         // workloads on the node, for the table of how it grows
	trials      int           // of connect in each sample of it
	adds        int           // likewise
}

func fullSizes(rounds int) sizes {
	return sizes{
		rounds: rounds, heavy: 5, whole: 3, setups: rounds,
		connections: 4000, parallel: 1500,
		churn: 60000, block: 4000, patience: 20 * time.Second,
		flow: 500 * time.Millisecond, workloads: 200, engines: 50, calls: 200000,
		settle: 500 * time.Millisecond,
		storm:  100, proxies: 1000, rest: 10 * time.Second, minutes: 5, minute: time.Minute, changes: 25, asked: 15,
		scale: []int{1, 100, 1000, 5000}, trials: 5, adds: 20,
	}
}

// quickSizes prove that every row can be measured; the figures mean little.
func quickSizes(rounds int) sizes {
	return sizes{
		rounds: rounds, heavy: 1, whole: 1, setups: rounds,
		connections: 500, parallel: 500,
		churn: 4000, block: 1000, patience: 10 * time.Second,
		flow: 100 * time.Millisecond, workloads: 20, engines: 5, calls: 20000,
		settle: 50 * time.Millisecond,
		storm:  3, proxies: 20, rest: time.Second, minutes: 2, minute: 2 * time.Second, changes: 3, asked: 2,
		scale: []int{1, 5}, trials: 1, adds: 2,
	}
}

// measure runs all rounds of m. The first failure ends it: a comparison with
// holes is none.
func (b *bench) measure(ctx context.Context, m measurement) (rows []row, err error) {
	rows = m.rows
	for i := range rows {
		rows[i].Samples = map[string][]float64{}
	}
	if m.begin != nil {
		if err := m.begin(); err != nil {
			return nil, fmt.Errorf("begin %s: %w", m.name, err)
		}
	}
	if m.end != nil {
		defer func() { err = errors.Join(err, m.end()) }()
	}
	start := time.Now()
	for round := range m.rounds {
		fmt.Fprintf(b.progress, "\r%-10s %-52s round %2d of %2d", m.name, m.about, round+1, m.rounds)
		for _, i := range rand.Perm(len(m.variants)) {
			got, err := m.run(ctx, m.variants[i])
			if err != nil {
				return nil, fmt.Errorf("measure %s, %s, round %d: %w", m.name, m.variants[i], round+1, err)
			}
			for _, row := range rows {
				if figure, found := got[row.ID]; found {
					row.Samples[m.variants[i]] = append(row.Samples[m.variants[i]], figure)
					delete(got, row.ID)
				}
			}
			if len(got) > 0 {
				return nil, fmt.Errorf("measure %s: no row for %v", m.name, slices.Sorted(maps.Keys(got)))
			}
		}
	}
	fmt.Fprintf(b.progress, "  %.0f s\n", time.Since(start).Seconds())
	return rows, nil
}

func (b *bench) newSite() (*site, error) { return newSite(b.netns, b.nextName()) }

// nextName is unique on the machine: it is the container ID too.
func (b *bench) nextName() string {
	b.made++
	return fmt.Sprintf("%s-%d", filepath.Base(filepath.Dir(b.netns)), b.made)
}

// A trial is one exchange between a client and the proxy.
type trial struct {
	inbound    bool // the client is outside
	sink       bool // the proxy counts and does not echo
	client     dialSpec
	clientCPUs []int
	proxyCPUs  []int
}

// An outcome is what a trial gave. CPU is that of both ends.
type outcome struct {
	dialReport
	CPU time.Duration
}

// try makes a fresh site for one trial of one variant, and proves that the
// proxy saw the right origin of every connection.
func (b *bench) try(ctx context.Context, v variant, t trial) (result outcome, err error) {
	s, err := b.newSite()
	if err != nil {
		return result, err
	}
	defer func() { err = errors.Join(err, s.close(), b.settle(ctx)) }()
	if err := v.install(s); err != nil {
		return result, fmt.Errorf("install: %w", err)
	}
	defer func() { err = errors.Join(err, v.remove(s)) }()
	return b.tryIn(ctx, s, v, t)
}

// tryIn is try in a site that is ready.
func (b *bench) tryIn(ctx context.Context, s *site, v variant, t trial) (outcome, error) {
	origin := addrPort(remote)
	t.client.To = v.outbound
	from := place{netns: s.inside, uid: taskUID, cgroup: b.task, cpus: t.clientCPUs}
	if t.inbound {
		origin = addrPort(service)
		t.client.To = v.inbound
		from.netns, from.cgroup = s.outside, b.foreign
	}
	server := serveSpec{
		Listen: []netip.AddrPort{addrPort(proxyOut), netip.AddrPortFrom(netip.IPv4Unspecified(), inboundPort)},
		Origin: origin,
		Sink:   t.sink,
	}
	at := place{netns: s.inside, uid: proxyUID, cgroup: b.proxy, cpus: t.proxyCPUs}
	result, served, err := b.exchange(ctx, server, at, t.client, from)
	if err != nil {
		return result, err
	}
	return result, checkOrigins(served, origin, v.redirect)
}

// exchange runs one client against one server.
func (b *bench) exchange(ctx context.Context, server serveSpec, at place, client dialSpec, from place) (result outcome, after serveReport, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("no result within a minute"))
	defer cancel()
	defer func() { err = errors.Join(err, context.Cause(ctx)) }()
	serving, err := startWorker(ctx, b.program, at, "serve", server)
	if err != nil {
		return result, after, err
	}
	defer func() { err = errors.Join(err, serving.stop()) }()
	dialling, err := startWorker(ctx, b.program, from, "dial", client)
	if err != nil {
		return result, after, err
	}
	defer func() { err = errors.Join(err, dialling.stop()) }()
	var before serveReport
	if err := serving.ask(&before); err != nil {
		return result, after, err
	}
	if err := dialling.ask(&result.dialReport); err != nil {
		return result, after, err
	}
	if err := serving.ask(&after); err != nil {
		return result, after, err
	}
	result.CPU = result.dialReport.CPU + after.CPU - before.CPU
	return result, after, nil
}

// checkOrigins fails when one connection reached the proxy with another origin
// than the one that was dialled, or with one although nothing redirects.
func checkOrigins(served serveReport, origin netip.AddrPort, redirected bool) error {
	total := served.Right + served.None + served.Wrong
	want := served.None
	if redirected {
		want = served.Right
	}
	if total == 0 || want != total {
		return fmt.Errorf("check origins of %d connections: %d were %s, %d had none, %d were wrong (%s): redirected is %t",
			total, served.Right, origin, served.None, served.Wrong, served.WrongOne, redirected)
	}
	return nil
}

// choose keeps the measurements that -only names, all when it names none.
func choose(all []part, only string) (chosen []part, err error) {
	if only == "" {
		return all, nil
	}
	names := strings.Split(only, ",")
	for _, p := range all {
		p.measurements = slices.DeleteFunc(slices.Clone(p.measurements), func(m measurement) bool {
			i := slices.Index(names, m.name)
			if i >= 0 {
				names = slices.Delete(names, i, i+1)
			}
			return i < 0
		})
		if len(p.measurements) > 0 {
			chosen = append(chosen, p)
		}
	}
	if len(names) > 0 {
		return nil, fmt.Errorf("-only %s: no such measurement", strings.Join(names, ","))
	}
	return chosen, nil
}
