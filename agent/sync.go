// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"crypto/sha256"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/weirmesh/weir/redirect/health"
)

// snapshot is the last good state of Consul, and how good it is now.
type snapshot struct {
	Proxies  map[string][]proxy // by allocation ID; "" for those without one
	Facts    catalogData
	Problems []string // registrations that cannot be read

	Ready  bool // there was an answer at some time
	Hidden bool // the token may not read all of the node
	InSync bool // the last read succeeded
	Since  time.Time
	// Noticed is when the last change was noticed that Proxies or Facts have.
	Noticed time.Time
	Error   health.Problem // why it is not in sync
	Watch   health.Problem // why no change tells itself; none where that is not wanted
	Bind    health.Problem // why IPv4 is assumed of listeners that name no address
	Counts  consulCounts
}

// consulWatcher keeps a view of Consul: one bulk read as truth, one blocking query
// as trigger. A failure leaves the view as it was.
type consulWatcher struct {
	consul  *consul
	changed func() // tells that view changed

	trigger chan struct{} // the blocking query returned, or a new allocation waits
	renewed chan struct{} // the token is another one, or no longer one: this cuts a back-off short

	mu      sync.Mutex
	view    snapshot
	waiting time.Time // since when the newest allocation waits for its registration; zero: none
	noticed time.Time // when the trigger was first pulled since the last read; zero: it was not

	self    self              // asked anew after a failure; Node is "" until it answered
	digest  [sha256.Size]byte // of the last answer
	lookups *queries
}

func newConsulWatcher(consul *consul, changed func()) *consulWatcher {
	return &consulWatcher{
		consul: consul, changed: changed, trigger: make(chan struct{}, 1), renewed: make(chan struct{}, 1),
		view: snapshot{Since: time.Now()}, lookups: newQueries(consul),
	}
}

// current is the view as it is now. Its maps are never written again.
func (f *consulWatcher) current() snapshot {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.view
}

// await says since when the newest allocation waits for its registration; the
// zero time says that none does.
func (f *consulWatcher) await(since time.Time) {
	f.mu.Lock()
	began := since.After(f.waiting)
	f.waiting = since
	f.mu.Unlock()
	if began {
		f.wake()
	}
}

func (f *consulWatcher) wake() {
	f.mu.Lock()
	if f.noticed.IsZero() {
		f.noticed = time.Now()
	}
	f.mu.Unlock()
	select {
	case f.trigger <- struct{}{}:
	default:
	}
}

// run follows Consul until ctx ends.
func (f *consulWatcher) run(ctx context.Context) {
	var watcher sync.WaitGroup
	defer watcher.Wait()
	if f.consul.config.Watch {
		watcher.Go(func() { f.watch(ctx) })
	}
	watcher.Go(func() { f.lookups.names.follow(ctx) })
	watcher.Go(func() { f.watchToken(ctx) })
	failures := 0
	for {
		if f.read(ctx) {
			failures = 0
		} else if ctx.Err() == nil {
			failures++
		}
		if !f.rest(ctx, time.Now().Add(f.pollInterval(failures).pause(rand.Float64())), failures > 0) {
			return
		}
	}
}

// pollInterval is the pace after so many failures in a row.
func (f *consulWatcher) pollInterval(failures int) pollInterval {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := pollInterval{watch: f.consul.config.Watch && f.view.Watch.What == "", failures: failures}
	if !f.waiting.IsZero() {
		t.waiting = max(time.Since(f.waiting), 1)
	}
	return t
}

// rest waits for the trigger or until the next read, and asks meanwhile what
// else is due. It reports false when ctx ended.
func (f *consulWatcher) rest(ctx context.Context, until time.Time, failing bool) bool {
	const atOnce = 100 * time.Millisecond // between two rounds of questions
	for {
		length, trigger, moved, asks := time.Until(until), f.trigger, f.lookups.names.moved, false
		if failing {
			trigger, moved = nil, nil // nothing but another token shortens the back-off
		} else if due := f.lookups.due; !due.IsZero() && due.Before(until) {
			length, asks = max(time.Until(due), atOnce), true
		}
		early, timer := false, time.NewTimer(length)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-trigger:
			early = true
		case <-f.renewed:
			early = true
		case <-moved:
			asks = true
		}
		timer.Stop()
		if ctx.Err() != nil || early || !asks {
			return ctx.Err() == nil
		}
		f.look(ctx)
	}
}

// look asks what is due beside the bulk read.
func (f *consulWatcher) look(ctx context.Context) {
	began := time.Now()
	known, moved := f.lookups.refresh(ctx, f.current().Proxies)
	if !moved {
		return
	}
	f.mu.Lock()
	f.view.Facts, f.view.Noticed = known, began
	f.mu.Unlock()
	f.changed()
}

// pollInterval decides when Consul is asked next.
type pollInterval struct {
	watch    bool
	failures int           // in a row
	waiting  time.Duration // of the newest allocation without a registration; 0: none
}

// pause is the time until the next read. jitter is from 0 to 1, so that the
// nodes of a cluster do not ask together.
func (t pollInterval) pause(jitter float64) time.Duration {
	const (
		slowest = time.Minute
		firstly = 5 * time.Second // Nomad registers within a moment of ADD
		atMost  = 2 * time.Minute // later it is no mesh allocation
	)
	spread := func(d time.Duration) time.Duration { return time.Duration(float64(d) * (0.5 + jitter)) }
	switch {
	case t.failures > 0:
		return spread(min(time.Second<<min(t.failures-1, 10), slowest))
	case t.waiting > 0 && t.waiting < firstly:
		return 250 * time.Millisecond
	case t.waiting > 0 && t.waiting < atMost:
		return spread(2 * time.Second)
	case t.watch:
		return spread(slowest)
	default:
		return spread(15 * time.Second)
	}
}

// watch turns the return of the blocking query into the trigger.
func (f *consulWatcher) watch(ctx context.Context) {
	var node string
	var index uint64
	failures := 0
	for ctx.Err() == nil {
		err := func() (err error) {
			if node == "" {
				found, err := f.consul.self(ctx)
				if err != nil {
					return err
				}
				node = found.Node
			}
			began := index
			if index, err = f.consul.changed(ctx, node, index); err != nil {
				return err
			}
			if index != began {
				f.wake()
			}
			return nil
		}()
		// A second apart at least: a busy catalog must not make the agent busy.
		length := 250 * time.Millisecond
		failures++
		if err != nil {
			node, index = "", 0
			length = pollInterval{failures: failures}.pause(rand.Float64())
		} else {
			failures = 0
		}
		f.watched(ctx, err)
		if _, alive := pause(ctx, length, nil); !alive {
			return
		}
	}
}

// watched tells how the blocking query went. Where it fails nobody says that
// anything changed, so Consul is read at once and then at the pace without one.
func (f *consulWatcher) watched(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return // the agent ends
	}
	problem := consulProblem(err)
	f.mu.Lock()
	turned := (problem.What == "") != (f.view.Watch.What == "")
	f.view.Watch = problem
	f.mu.Unlock()
	if turned {
		f.wake()
		f.changed()
	}
}

// read reads Consul once and reports whether that succeeded.
func (f *consulWatcher) read(ctx context.Context) bool {
	began := f.began()
	got, err := f.consul.services(ctx)
	if err != nil {
		f.failed(ctx, err)
		return false
	}
	if f.self.Node == "" {
		// Without an answer, as a token may forbid it, IPv4 is assumed.
		if f.self, err = f.consul.self(ctx); err != nil {
			f.self.Loopback = loopback4()
		}
	}
	bind := consulProblem(err)
	next := f.current()
	digest := sha256.Sum256(append([]byte{boolByte(got.hidden), boolByte(f.self.Loopback.Is6())}, got.body...))
	fresh := digest != f.digest || !next.Ready
	if fresh {
		proxies, problems, err := parseServices(got.body, f.self.Loopback)
		if err != nil {
			f.failed(ctx, err)
			return false
		}
		next.Proxies, next.Problems, next.Hidden = byAllocation(proxies), problems, got.hidden
	}
	known, moved := f.lookups.refresh(ctx, next.Proxies)
	if moved {
		next.Facts = known
	}
	if fresh || moved {
		next.Noticed = began
	}
	recovered := !next.InSync
	if recovered {
		next.InSync, next.Error, next.Since = true, health.Problem{}, time.Now()
	}
	assumes := bind != next.Bind
	next.Ready, next.Bind = true, bind
	f.digest = digest
	f.mu.Lock()
	next.Watch = f.view.Watch // not the reader's
	next.Counts.Reads++
	next.Counts.Bytes += uint64(len(got.body))
	if fresh {
		next.Counts.Changes++
	}
	f.view = next
	f.mu.Unlock()
	if fresh || moved || recovered || assumes {
		f.changed()
	}
	return true
}

// began is when what brought about a read was noticed: by the trigger, or now.
func (f *consulWatcher) began() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	began := f.noticed
	f.noticed = time.Time{}
	if began.IsZero() {
		began = time.Now()
	}
	return began
}

// failed keeps the view and says why it may be old.
func (f *consulWatcher) failed(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return // the agent ends
	}
	f.self = self{}
	f.mu.Lock()
	if f.view.InSync || f.view.Error.What == "" {
		f.view.InSync, f.view.Since = false, time.Now()
	}
	news := f.view.Error.What != err.Error()
	f.view.Error = consulProblem(err)
	f.view.Counts.Failures++
	f.mu.Unlock()
	if news {
		f.changed()
	}
}

func boolByte(set bool) byte {
	if set {
		return 1
	}
	return 0
}

func byAllocation(proxies []proxy) map[string][]proxy {
	found := make(map[string][]proxy)
	for _, p := range proxies {
		found[p.AllocID] = append(found[p.AllocID], p)
	}
	return found
}

// parseAddresses keeps what is an address.
func parseAddresses(texts []string) (list []netip.Addr) {
	for _, text := range texts {
		if addr, err := netip.ParseAddr(text); err == nil {
			list = append(list, addr.Unmap())
		}
	}
	slices.SortFunc(list, netip.Addr.Compare)
	return slices.Compact(list)
}
