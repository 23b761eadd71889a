// SPDX-License-Identifier: MPL-2.0

package catalog

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/weirmesh/weir/agent/catalog/failure"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/agent/wait"
	"github.com/weirmesh/weir/redirect/health"
)

const (
	// Watches is how many services are watched at a time. Each is a connection to the
	// local Consul agent, which takes 200 of one address unless configured otherwise.
	Watches = 16
	// watchTurn is how long each is watched where there are more: with its index the
	// next turn tells also what happened between.
	watchTurn = 4 * time.Second
)

// Presence is whether a service has instances in Consul's catalog.
type Presence int

const (
	PresenceUnknown Presence = iota
	Present
	Absent
)

// Seen is what the watch of one service tells.
type Seen struct {
	Presence Presence
	Replaced int // times that no instance may be left of those before: it may have gone and come back
	Missed   int // times that this may have happened unseen
}

// serviceWatches are the services whose virtual IPs this node needs, and of each
// whether it has instances: one blocking query for each, whatever the number of
// proxies, and none for any other. As long as a service has an instance, Consul
// keeps its virtual IP; when the last is gone the address may be another
// service's at once.
type serviceWatches struct {
	consul *Client
	moved  chan struct{} // something is other than it was
	wanted chan struct{} // other services are

	mu       sync.Mutex
	services map[registration.Service]*watchedService
	idle     []*watchedService // nobody asks for; whose turn comes first is first
	why      health.Problem    // Consul does not answer at all
	failures int               // ... so many times in a row
	retry    time.Time         // ... and not to be asked before
	asking   int               // questions under way
}

type watchedService struct {
	Seen
	of      registration.Service
	index   uint64         // of the last answer, to wait from; 0: there is nothing to wait from
	last    uint64         // ... and what it was before there was none any more
	unseen  bool           // ... was of the index alone
	byIndex bool           // the next one is to be: its instances cannot be seen
	why     health.Problem // Consul does not answer for it
	tries   int            // ... so many times in a row
	next    time.Time      // when to ask
	cancel  func()         // ends the question under way; nil: there is none
}

func newServiceWatches(consul *Client) *serviceWatches {
	return &serviceWatches{
		consul: consul, moved: make(chan struct{}, 1), wanted: make(chan struct{}, 1),
		services: make(map[registration.Service]*watchedService),
	}
}

// Want says which services are to be watched. Those of a peer are not in this
// cluster's catalog.
func (n *serviceWatches) Want(services []registration.Service) {
	n.mu.Lock()
	defer n.mu.Unlock()
	before, wanted, news := len(n.services), make(map[registration.Service]*watchedService), false
	for _, of := range services {
		if of.Peer != "" {
			continue
		}
		s := n.services[of]
		if s == nil {
			s, news = &watchedService{of: of}, true
		}
		wanted[of] = s
	}
	for of, s := range n.services {
		if wanted[of] == nil || before <= Watches && len(wanted) > Watches { // the others shall have their turn
			s.stop()
		}
	}
	n.services = wanted
	if !news && len(wanted) == before {
		return // they are the same
	}
	n.idle = n.idle[:0]
	for _, s := range wanted {
		if s.cancel == nil {
			n.idle = append(n.idle, s)
		}
	}
	slices.SortFunc(n.idle, byTurn)
	if news {
		signal(n.wanted)
	}
}

func byTurn(a, b *watchedService) int { return a.next.Compare(b.next) }

func (s *watchedService) stop() {
	if s.cancel != nil {
		s.cancel()
	}
}

func signal(to chan struct{}) {
	select {
	case to <- struct{}{}:
	default:
	}
}

// Of tells of a service.
func (n *serviceWatches) Of(of registration.Service) Seen {
	n.mu.Lock()
	defer n.mu.Unlock()
	if s := n.services[of]; s != nil {
		return s.Seen
	}
	return Seen{}
}

// unknown is why it is not known of one at least; nothing where it is of all.
func (n *serviceWatches) unknown() health.Problem {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.problem()
}

// problem is that of Consul, or of the first service in the order of names.
func (n *serviceWatches) problem() (why health.Problem) {
	if n.why.What != "" {
		return n.why
	}
	for _, s := range n.services {
		if s.why.What != "" && (why.What == "" || s.why.What < why.What) {
			why = s.why
		}
	}
	return why
}

// Follow watches what is wanted until ctx ends.
func (n *serviceWatches) Follow(ctx context.Context) {
	var running sync.WaitGroup
	defer running.Wait()
	done := make(chan struct{}, 1)
	for ctx.Err() == nil {
		due := n.start(ctx, func(ask func()) {
			running.Go(func() {
				ask()
				signal(done)
			})
		})
		timer := time.NewTimer(due)
		select {
		case <-ctx.Done():
		case <-n.wanted:
		case <-done:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// start asks for those whose turn it is, and returns the time until the next is
// due. Of a Consul that does not answer one question is asked at a time.
func (n *serviceWatches) start(ctx context.Context, run func(ask func())) (due time.Duration) {
	const idle = time.Hour // until something is wanted
	n.mu.Lock()
	defer n.mu.Unlock()
	for {
		if len(n.idle) == 0 {
			return idle
		}
		s := n.idle[0]
		at := s.next
		if n.failures > 0 && n.retry.After(at) {
			at = n.retry
		}
		if due = time.Until(at); due > 0 {
			return due
		}
		if n.asking >= Watches || n.failures > 0 && n.asking > 0 {
			return idle // whichever ends first lets this one begin
		}
		asking, cancel := context.WithCancel(ctx)
		s.cancel, n.idle = cancel, slices.Delete(n.idle, 0, 1)
		n.asking++
		q := question{of: s.of, index: s.index, unseen: s.byIndex, wait: n.consul.Block}
		if len(n.services) > Watches {
			q.wait = watchTurn
		}
		run(func() {
			defer cancel()
			answer, err := n.consul.watchService(asking, q)
			n.settle(asking, s, q, answer, err)
		})
	}
}

// settle takes an answer in.
func (n *serviceWatches) settle(asking context.Context, s *watchedService, q question, answer instances, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asking--
	s.cancel = nil
	defer n.rejoin(s)
	if asking.Err() != nil {
		return // it was told to end, and is asked again if it is still wanted
	}
	seen, why, whyAll := s.Seen, s.why, n.why
	switch {
	case !concernsOne(err): // who waits for an answer waits for the same Consul
		n.failures++
		n.why, n.retry = failure.Problem(err), time.Now().Add(wait.PollInterval{Failures: n.failures}.Pause(rand.Float64()))
		for _, other := range n.services {
			other.Presence, other.index = PresenceUnknown, 0
			other.stop()
		}
	case err != nil:
		s.tries++
		s.Presence, s.index, s.why = PresenceUnknown, 0, failure.Problem(err)
		s.next = time.Now().Add(wait.PollInterval{Failures: s.tries}.Pause(rand.Float64()))
	default:
		n.failures, n.why, s.tries, s.why = 0, health.Problem{}, 0, health.Problem{}
		s.take(q, answer)
		s.next = time.Now().Add(n.rest(answer.count))
	}
	if s.Seen != seen || s.why != why || n.why != whyAll {
		signal(n.moved)
	}
}

// rejoin lets one that nobody asks for any more wait for its next turn, if it is still
// wanted.
func (n *serviceWatches) rejoin(s *watchedService) {
	if n.services[s.of] != s {
		return
	}
	at, _ := slices.BinarySearchFunc(n.idle, s, byTurn)
	n.idle = slices.Insert(n.idle, at, s)
}

// rest is the time between two questions for a service: one with many instances,
// or that changes all the time, must not make the agent busy.
func (n *serviceWatches) rest(instances int) time.Duration {
	const atLeast, each = time.Second, time.Millisecond
	rest := max(atLeast, time.Duration(instances)*each)
	if !n.consul.Config.Watch {
		rest = max(15*time.Second, time.Duration(len(n.services))*watchTurn/Watches)
	}
	return time.Duration(float64(rest) * (0.5 + rand.Float64()))
}

// take compares an answer with the one before.
func (s *watchedService) take(q question, answer instances) {
	before, again := s.last, s.last > 0 && s.unseen == q.unseen
	s.last, s.index = answer.index, answer.index
	switch moved := answer.index > before; {
	case again && answer.index < before: // Consul began anew
		s.Missed++
	case q.unseen && moved: // nobody says which instances came or went
		s.Replaced++
	case again && s.Presence != Absent && answer.count > 0 && answer.oldest > before: // none of those before is left
		s.Replaced++
	}
	if s.unseen = q.unseen; q.unseen {
		if answer.index != before && again { // see whether it has instances yet, and can be seen now
			s.byIndex, s.index = false, 0
		}
		return
	}
	presence := Absent
	if s.byIndex = answer.unseen; answer.count > 0 || answer.unseen {
		presence = Present
	}
	if emptied := presence == Absent && s.Presence == Present; emptied || answer.unseen {
		// A stream leaves out without a word what the token may not see any more; the
		// answer to a plain question says so.
		s.index = 0
	}
	s.Presence = presence
}

// absentInterval is how soon a virtual IP is asked for again whose service has no
// instance: what keeps the address, a configuration entry, is in no list. Of many
// one is asked a second.
func absentInterval(services int) time.Duration {
	return max(10*time.Second, time.Duration(services)*time.Second)
}

// gatewayInterval is the same of a gateway's listeners, which no registration
// tells of.
func gatewayInterval(gateways int) time.Duration {
	return max(5*time.Second, time.Duration(gateways)*2*time.Second)
}

// peerInterval is how soon the virtual IP of a peer's service is asked for again:
// no list of this cluster has it.
func peerInterval(services int) time.Duration {
	return max(30*time.Second, time.Duration(services)*2*time.Second)
}

// OnCatalogChange lets those be asked at once whose service came to the catalog or
// went, and those soon, one after the other, of which that may have been missed.
func (l *Queries) OnCatalogChange() {
	for of, question := range l.Virtual {
		now := l.Services.Of(of)
		if missed := now.Missed != question.Seen.Missed; missed {
			question.Next = earlier(question.Next, l.Now().Add(rand.N(LookupInterval/10)))
		}
		before := question.Seen
		question.Seen.Missed = now.Missed
		if now.Presence == PresenceUnknown || now == before {
			continue
		}
		// What was answered before the service was watched is right if it has
		// instances.
		first := before.Presence == PresenceUnknown
		if now.Replaced != before.Replaced || now.Presence != before.Presence && (!first || now.Presence == Absent || len(question.answer) == 0) {
			question.Next, question.tries = time.Time{}, 0
		}
		question.Seen = now
	}
}

// ShortenDeadlines brings forward what may change without a sign. What was never asked has
// its turn at once.
func (l *Queries) ShortenDeadlines() {
	count, peers := 0, 0
	for of, question := range l.Virtual {
		if question.Seen.Presence == Absent {
			count++
		}
		if of.Peer != "" {
			peers++
		}
	}
	for of, question := range l.Virtual {
		if question.Seen.Presence == Absent {
			question.Next = earlier(question.Next, l.Now().Add(absentInterval(count)))
		}
		if of.Peer != "" {
			question.Next = earlier(question.Next, l.Now().Add(peerInterval(peers)))
		}
	}
	for _, question := range l.Gateways {
		question.Next = earlier(question.Next, l.Now().Add(gatewayInterval(len(l.Gateways))))
	}
}
