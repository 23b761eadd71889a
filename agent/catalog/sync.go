// SPDX-License-Identifier: MPL-2.0

package catalog

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog/failure"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/agent/wait"
	"github.com/weirmesh/weir/redirect/health"
)

// Snapshot is the last good state of Consul, and how good it is now.
type Snapshot struct {
	Proxies  map[string][]registration.Proxy // by allocation ID; "" for those without one
	Facts    Data
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
	Counts  api.ConsulCounts
}

// Watcher keeps a view of Consul: one bulk read as truth, one blocking query
// as trigger. A failure leaves the view as it was.
type Watcher struct {
	Client  *Client
	changed func() // tells that view changed

	trigger chan struct{} // the blocking query returned, or a new allocation waits
	renewed chan struct{} // the token is another one, or no longer one: this cuts a back-off short

	mu      sync.Mutex
	view    Snapshot
	waiting time.Time // since when the newest allocation waits for its registration; zero: none
	awaited []string  // the allocations that do
	noticed time.Time // when the trigger was first pulled since the last read; zero: it was not

	self    self              // asked anew after a failure; Node is "" until it answered
	digest  [sha256.Size]byte // of the last answer
	bulk    time.Time         // when the last bulk read ended
	owed    bool              // something may have changed since it, see readAlone
	Lookups *Queries
}

func NewWatcher(consul *Client, changed func()) *Watcher {
	return &Watcher{
		Client: consul, changed: changed, trigger: make(chan struct{}, 1), renewed: make(chan struct{}, 1),
		view: Snapshot{Since: time.Now()}, Lookups: NewQueries(consul),
	}
}

// Current is the view as it is now. Its maps are never written again.
func (f *Watcher) Current() Snapshot {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.view
}

func (f *Watcher) Wake() {
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

// Run follows Consul until ctx ends.
func (f *Watcher) Run(ctx context.Context) {
	var watcher sync.WaitGroup
	defer watcher.Wait()
	if f.Client.Config.Watch {
		watcher.Go(func() { f.watch(ctx) })
	}
	watcher.Go(func() { f.Lookups.Services.Follow(ctx) })
	watcher.Go(func() { f.watchToken(ctx) })
	failures := 0
	for {
		began := time.Now()
		if some := f.alone(); len(some) > 0 && f.readAlone(ctx, some) || f.Read(ctx) {
			failures = 0
		} else if ctx.Err() == nil {
			failures++
		}
		interval := f.PollInterval(failures)
		interval.Took = time.Since(began)
		next := time.Now().Add(interval.Pause(rand.Float64()))
		if due := f.bulk.Add(bulkApart); f.owed && due.Before(next) {
			next = due
		}
		if !f.rest(ctx, next, failures > 0) {
			return
		}
	}
}

// PollInterval is the pace after so many failures in a row.
func (f *Watcher) PollInterval(failures int) wait.PollInterval {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := wait.PollInterval{Watch: f.Client.Config.Watch && f.view.Watch.What == "", Failures: failures}
	if !f.waiting.IsZero() {
		t.Waiting = max(time.Since(f.waiting), 1)
	}
	return t
}

// rest waits for the trigger or until the next read, and asks meanwhile what
// else is due. It reports false when ctx ended.
func (f *Watcher) rest(ctx context.Context, until time.Time, failing bool) bool {
	const atOnce = 100 * time.Millisecond // between two rounds of questions
	for {
		length, trigger, moved, asks := time.Until(until), f.trigger, f.Lookups.Services.moved, false
		if failing {
			trigger, moved = nil, nil // nothing but another token shortens the back-off
		} else if due := f.Lookups.due; !due.IsZero() && due.Before(until) {
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
		f.Look(ctx)
	}
}

// Look asks what is due beside the bulk read.
func (f *Watcher) Look(ctx context.Context) {
	began := time.Now()
	known, moved := f.Lookups.Refresh(ctx, f.Current().Proxies)
	if !moved {
		return
	}
	f.mu.Lock()
	f.view.Facts, f.view.Noticed = known, began
	f.mu.Unlock()
	f.changed()
}

// watch turns the return of the blocking query into the trigger.
func (f *Watcher) watch(ctx context.Context) {
	var node string
	var index uint64
	failures := 0
	for ctx.Err() == nil {
		err := func() (err error) {
			if node == "" {
				found, err := f.Client.Self(ctx)
				if err != nil {
					return err
				}
				node = found.Node
			}
			began := index
			if index, err = f.Client.Changed(ctx, node, index); err != nil {
				return err
			}
			if index != began {
				f.Wake()
			}
			return nil
		}()
		// A second apart at least: a busy catalog must not make the agent busy.
		length := 250 * time.Millisecond
		failures++
		if err != nil {
			node, index = "", 0
			length = wait.PollInterval{Failures: failures}.Pause(rand.Float64())
		} else {
			failures = 0
		}
		f.watched(ctx, err)
		if _, alive := wait.Pause(ctx, length, nil); !alive {
			return
		}
	}
}

// watched tells how the blocking query went. Where it fails nobody says that
// anything changed, so Consul is read at once and then at the pace without one.
func (f *Watcher) watched(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return // the agent ends
	}
	problem := failure.Problem(err)
	f.mu.Lock()
	turned := (problem.What == "") != (f.view.Watch.What == "")
	f.view.Watch = problem
	f.mu.Unlock()
	if turned {
		f.Wake()
		f.changed()
	}
}

// Read reads Consul once and reports whether that succeeded.
func (f *Watcher) Read(ctx context.Context) bool {
	began := f.began()
	got, err := f.Client.Services(ctx)
	if err != nil {
		f.failed(ctx, err)
		return false
	}
	if f.self.Node == "" {
		// Without an answer, as a token may forbid it, IPv4 is assumed.
		if f.self, err = f.Client.Self(ctx); err != nil {
			f.self.Loopback = registration.Loopback4()
		}
	}
	f.bulk, f.owed = time.Now(), false
	bind := failure.Problem(err)
	next := f.Current()
	digest := digestOf(got, f.self.Loopback)
	fresh := digest != f.digest || !next.Ready
	if fresh {
		proxies, problems, err := registration.ParseServices(got.Body, f.self.Loopback)
		if err != nil {
			f.failed(ctx, err)
			return false
		}
		next.Proxies, next.Problems, next.Hidden = ByAllocation(proxies), problems, got.Hidden
	}
	known, moved := f.Lookups.Refresh(ctx, next.Proxies)
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
	next.Counts.Reads++
	next.Counts.Bytes += uint64(len(got.Body))
	if fresh {
		next.Counts.Changes++
	}
	f.publish(next)
	if fresh || moved || recovered || assumes {
		f.changed()
	}
	return true
}

// publish makes what a read made of the view the view.
func (f *Watcher) publish(next Snapshot) {
	f.mu.Lock()
	defer f.mu.Unlock()
	next.Watch = f.view.Watch // not the reader's
	f.view = next
}

// began is when what brought about a read was noticed: by the trigger, or now.
func (f *Watcher) began() time.Time {
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
func (f *Watcher) failed(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return // the agent ends
	}
	f.self = self{}
	f.Lookups.Failed()
	f.mu.Lock()
	if f.view.InSync || f.view.Error.What == "" {
		f.view.InSync, f.view.Since = false, time.Now()
	}
	news := f.view.Error.What != err.Error()
	f.view.Error = failure.Problem(err)
	f.view.Counts.Failures++
	f.mu.Unlock()
	if news {
		f.changed()
	}
}

// digestOf tells an answer, and how it is read, from others.
func digestOf(got answer, loopback netip.Addr) (digest [sha256.Size]byte) {
	sum := sha256.New()
	fmt.Fprintln(sum, got.Hidden, loopback) // never fails
	sum.Write(got.Body)
	return [sha256.Size]byte(sum.Sum(nil))
}

func ByAllocation(proxies []registration.Proxy) map[string][]registration.Proxy {
	found := make(map[string][]registration.Proxy)
	for _, p := range proxies {
		found[p.AllocID] = append(found[p.AllocID], p)
	}
	return found
}

// ParseAddresses keeps what is an address that the data path can have: in none of its
// maps is a zone.
func ParseAddresses(texts []string) (list []netip.Addr) {
	for _, text := range texts {
		if addr, err := netip.ParseAddr(text); err == nil && addr.Zone() == "" {
			list = append(list, addr.Unmap())
		}
	}
	slices.SortFunc(list, netip.Addr.Compare)
	return slices.Compact(list)
}
