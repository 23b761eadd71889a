// SPDX-License-Identifier: MPL-2.0

package soak

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/test"
)

// figures are what a run is judged by.
type figures struct {
	connections, transferred      atomic.Int64
	wrong, failed, stuck          atomic.Int64
	added, deleted, checked, gced atomic.Int64
	killedPlugins, killedAgents   atomic.Int64
	rolled, damaged, misbehaved   atomic.Int64
	full                          atomic.Int64
	mutex                         sync.Mutex
	told                          []string
}

func (f *figures) String() string {
	return fmt.Sprintf("%d connections, %d MiB transferred; %d ADD, %d DEL, %d CHECK, %d GC; killed %d plugins, %d agents; %d versions rolled, "+
		"%d losses of pins or records, %d misbehaviours of Consul or Docker, %d full disks: %d wrong, %d failed, %d stuck",
		f.connections.Load(), f.transferred.Load()>>20, f.added.Load(), f.deleted.Load(), f.checked.Load(), f.gced.Load(), f.killedPlugins.Load(),
		f.killedAgents.Load(), f.rolled.Load(), f.damaged.Load(), f.misbehaved.Load(), f.full.Load(), f.wrong.Load(), f.failed.Load(), f.stuck.Load())
}

// bad tells if anything was wrong, failed or stuck.
func (f *figures) bad() bool { return f.wrong.Load()+f.failed.Load()+f.stuck.Load() > 0 }

// tell counts a problem and keeps the text of the first ones.
func (f *figures) tell(counter *atomic.Int64, format string, args ...any) {
	counter.Add(1)
	f.mutex.Lock()
	defer f.mutex.Unlock()
	if len(f.told) < 8 {
		f.told = append(f.told, time.Now().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
	}
}

// problem sorts an error into what failed and what did not end.
func (f *figures) problem(err error, what string) {
	counter := &f.failed
	if strings.Contains(err.Error(), "timeout") || strings.Contains(err.Error(), "deadline exceeded") {
		counter = &f.stuck
	}
	f.tell(counter, "%s: %v", what, err)
}

// load is connections without end. Those who take away what redirects hold its mutex
// meanwhile, so that each connection that is made must arrive.
type load struct {
	*figures
	pause sync.RWMutex
	lost  atomic.Int64 // how often what the kernel knows of open connections began or ended to be lost: odd while it is, and paused
	stop  chan struct{}
	done  sync.WaitGroup
}

func newLoad() *load { return &load{figures: &figures{}, stop: make(chan struct{})} }

// interval is the time between two connections of one task.
const interval = 10 * time.Millisecond

// keep calls each again and again until the end, and not while the load is paused.
func (l *load) keep(seed uint64, each func(random *rand.Rand)) {
	l.done.Go(func() {
		random, ticker := rand.New(rand.NewPCG(seed, 1)), time.NewTicker(interval)
		defer ticker.Stop()
		for {
			select {
			case <-l.stop:
				return
			case <-ticker.C:
				l.pause.RLock()
				each(random)
				l.pause.RUnlock()
			}
		}
	})
}

func (l *load) end() {
	close(l.stop)
	l.done.Wait()
}

// dial checks one connection: who answers, the origin that it sees, and whom the task
// believes to have reached.
func (l *load) dial(ask func(network, addr string) (test.Answer, error), target netip.AddrPort, server string, origin netip.AddrPort) {
	answer, err := ask("tcp", target.String())
	l.connections.Add(1)
	switch {
	case err != nil:
		l.problem(err, fmt.Sprintf("dial %s, which %q should answer", target, server))
	case answer.Server != server || answer.Origin != origin || answer.To != target:
		l.tell(&l.wrong, "dial %s: %+v, want server %q and origin %s", target, answer, server, origin)
	}
}

// dials is one round of an allocation's connections: to anywhere, by both families, to
// the upstream's virtual IP, and to the allocation from outside.
func (l *load) dials(a *alloc, virtual netip.Addr, random *rand.Rand) {
	far := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, byte(18 + random.IntN(2)), byte(random.IntN(256)), byte(random.IntN(256))}), uint16(1+random.IntN(65000)))
	switch random.IntN(4) {
	case 0:
		l.dial(a.task.Ask, far, a.out.Name, far)
	case 1:
		if a.addr6.IsValid() {
			far = netip.AddrPortFrom(netip.AddrFrom16([16]byte{0: 0x20, 1: 0x01, 2: 0x0d, 3: 0xb8, 14: byte(random.IntN(256)), 15: byte(random.IntN(256))}), far.Port())
		}
		l.dial(a.task.Ask, far, a.out.Name, far)
	case 2:
		target := netip.AddrPortFrom(virtual, 80)
		l.dial(a.task.Ask, target, a.upstream.Name, netip.AddrPort{}) // the listener has one destination, and asks for none
	case 3:
		target := netip.AddrPortFrom(a.addr, 8080)
		l.dial(func(network, addr string) (test.Answer, error) { return test.Ask(a.host, network, addr) }, target, a.in.Name, target)
	}
}

// transfers sends over one open connection for as long as the run takes, whatever is
// taken away meanwhile. With the maps goes where it was dialled to; then another one
// takes its place as soon as there are maps again.
func (l *load) transfers(a *alloc, process *test.Process, seed uint64) {
	target := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(a.number)}), 443)
	l.done.Go(func() {
		opened := int64(-1)
		random := rand.New(rand.NewPCG(seed, 2))
		ticker := time.NewTicker(10 * interval)
		defer ticker.Stop()
		for {
			select {
			case <-l.stop:
				return
			case <-ticker.C:
			}
			request := transferRequest{Bytes: 1 + random.IntN(256<<10), Seed: random.Uint64()}
			got, err := l.transfer(process, request, target, &opened)
			if err != nil {
				l.problem(err, "transfer to "+target.String())
				return // the connection is gone
			}
			l.transferred.Add(2 * int64(request.Bytes))
			known := l.lost.Load() == opened
			if got.Sent != got.Received || got.Seen.Server != a.out.Name || known && (got.Seen.Origin != target || got.Seen.To != target) {
				l.tell(&l.wrong, "transfer of %d bytes to %s: %+v", request.Bytes, target, got)
			}
		}
	})
}

// transfer is one round of them. A connection is dialled when nothing is lost, and then
// nothing is taken away before it is open.
func (l *load) transfer(process *test.Process, request transferRequest, target netip.AddrPort, opened *int64) (got transferred, err error) {
	if lost := l.lost.Load(); *opened < 0 || lost != *opened && lost%2 == 0 {
		l.pause.RLock()
		defer l.pause.RUnlock()
		request.Target, *opened = target.String(), l.lost.Load()
	}
	err = process.Call(request, &got)
	return got, err
}
