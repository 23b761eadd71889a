// SPDX-License-Identifier: MPL-2.0

package catalog

import (
	"cmp"
	"context"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/catalog/failure"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/health"
)

// Queries are the questions that the bulk read leaves open: virtual IPs of
// upstreams, listeners of gateways, exposed checks. Each is asked once for all
// proxies, seldom while it has an answer, ever more seldom while not, and at once
// where there is a sign that the answer is another.
type Queries struct {
	consul   *Client
	Now      func() time.Time
	Services *serviceWatches

	Virtual  map[registration.Service]*Query[[]netip.Addr]
	Gateways map[registration.Gateway]*Query[[]uint16]
	checks   Query[map[string][]uint16]
	allowed  Query[[]registration.Intention]
	exposed  []string       // services whose checks were asked for
	unnamed  health.Problem // why nobody tells which services come and go
	halted   health.Problem // what ended the last pass before every question had its turn
	due      time.Time      // when the next question is; zero: there is none
	failing  bool           // Consul did not answer the last time
	whole    time.Time      // when it has its state again, after it had failed
}

// Query is one question.
type Query[T any] struct {
	answer   T
	answered bool           // once at least: nothing is an answer too
	why      health.Problem // there is no answer
	Next     time.Time      // when to ask again
	tries    int            // in a row without an answer
	Seen     Seen           // of the service, as heeded
}

const (
	LookupsAtOnce    = 256
	LookupInterval   = 5 * time.Minute
	lookupRetry      = 2 * time.Second
	ListenerInterval = 30 * time.Second // of what may change without a sign
	ReplayTime       = 5 * time.Second  // after a failure, for which an answer may lack what the server has not read yet
)

func NewQueries(consul *Client) *Queries {
	return &Queries{
		consul: consul, Now: time.Now, Services: newServiceWatches(consul),
		Virtual: make(map[registration.Service]*Query[[]netip.Addr]), Gateways: make(map[registration.Gateway]*Query[[]uint16]),
	}
}

// round is one pass of questions: how many are left, and what ended it.
type round struct {
	*Queries
	left   int
	failed health.Problem
	moved  bool
}

func (r *round) halted() bool { return r.failed.What != "" }

// due takes one of the questions that are left for what is to be asked next then.
func (r *round) due(next time.Time) bool {
	if r.halted() || r.left == 0 || r.Now().Before(next) {
		return false
	}
	r.left--
	return true
}

// heard notes what an answer means for the rest of the round.
func (r *round) heard(moved bool, err error) {
	r.moved = r.moved || moved
	if !concernsOne(err) {
		r.failed = failure.Problem(err)
		r.Failed()
	}
}

// Failed says that Consul does not answer.
func (l *Queries) Failed() { l.failing = true }

// Refresh asks what is due for these proxies, and returns what is known and whether any of it
// moved. An error ends the pass, but for one that concerns one question; what was known stays.
func (l *Queries) Refresh(ctx context.Context, byAllocation map[string][]registration.Proxy) (known Data, moved bool) {
	if l.failing {
		l.failing, l.whole = false, l.Now().Add(ReplayTime)
	}
	r := &round{Queries: l, left: LookupsAtOnce}
	compete := Competing(byAllocation)
	if compete && r.due(l.allowed.Next) {
		answer, err := l.consul.Intentions(ctx)
		moved := l.allowed.settle(l.Now(), answer, err, len(answer) > 0, slices.Equal)
		l.allowed.Next = earlier(l.allowed.Next, l.Now().Add(ListenerInterval))
		r.heard(moved, err)
	}
	services, gateways, checks := Questions(byAllocation, l.allowed.answer)
	r.askServices(ctx, services)
	r.askGateways(ctx, gateways)
	r.askChecks(ctx, checks)
	l.ShortenDeadlines()
	unnamed := l.Services.unknown()
	moved = r.moved || r.failed != l.halted || unnamed != l.unnamed
	l.halted, l.unnamed = r.failed, unnamed
	l.due = l.nextDue(compete, len(checks) > 0)
	if r.halted() { // whoever comes next would fare no better
		l.due = l.Now().Add(ListenerInterval)
	}
	return l.known(), moved
}

// askServices asks for virtual IPs; services are sorted.
func (r *round) askServices(ctx context.Context, services []registration.Service) {
	maps.DeleteFunc(r.Virtual, func(of registration.Service, _ *Query[[]netip.Addr]) bool {
		_, wanted := slices.BinarySearchFunc(services, of, compareServices)
		return !wanted
	})
	r.Services.Want(services)
	r.OnCatalogChange()
	for _, of := range services {
		question := r.Virtual[of]
		if question == nil {
			question = &Query[[]netip.Addr]{Seen: r.Services.Of(of)}
			r.Virtual[of] = question
		}
		if r.due(question.Next) {
			answer, err := r.consul.VirtualIPs(ctx, of)
			if err == nil && len(answer) == 0 && len(question.answer) > 0 && r.Now().Before(r.whole) {
				question.Next = r.whole // it may not know yet
				continue
			}
			r.heard(question.settle(r.Now(), answer, err, len(answer) > 0, slices.Equal), err)
		}
	}
}

// askGateways asks for the ports of these gateways.
func (r *round) askGateways(ctx context.Context, gateways []registration.Gateway) {
	maps.DeleteFunc(r.Gateways, func(of registration.Gateway, _ *Query[[]uint16]) bool { return !slices.Contains(gateways, of) })
	for _, of := range gateways {
		question := r.Gateways[of]
		if question == nil {
			question = new(Query[[]uint16])
			r.Gateways[of] = question
		}
		if r.due(question.Next) {
			answer, err := r.consul.GatewayPorts(ctx, of)
			r.heard(question.settle(r.Now(), answer, err, len(answer) > 0, slices.Equal), err)
		}
	}
}

// askChecks asks for the ports of exposed checks, of these services.
func (r *round) askChecks(ctx context.Context, checks []string) {
	if !slices.Equal(checks, r.exposed) {
		r.exposed, r.checks.Next, r.checks.tries = checks, time.Time{}, 0
	}
	if len(checks) == 0 || !r.due(r.checks.Next) {
		return
	}
	answer, err := r.consul.Checks(ctx)
	same := func(a, b map[string][]uint16) bool { return maps.EqualFunc(a, b, slices.Equal[[]uint16]) }
	missing := func(id string) bool { return len(answer[id]) == 0 }
	moved := r.checks.settle(r.Now(), answer, err, !slices.ContainsFunc(checks, missing), same)
	r.checks.Next = earlier(r.checks.Next, r.Now().Add(ListenerInterval))
	r.heard(moved, err)
}

// nextDue is when the next question is due; zero: none is.
func (l *Queries) nextDue(compete, checks bool) (due time.Time) {
	for _, question := range l.Virtual {
		due = sooner(due, question.turn(l.Now()))
	}
	for _, question := range l.Gateways {
		due = sooner(due, question.turn(l.Now()))
	}
	if compete {
		due = sooner(due, l.allowed.turn(l.Now()))
	}
	if checks {
		due = sooner(due, l.checks.turn(l.Now()))
	}
	return due
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// sooner is earlier, where the zero time is none.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() {
		return b
	}
	return earlier(a, b)
}

// turn is when to ask: now where it was never asked, for want of a turn.
func (q *Query[T]) turn(now time.Time) time.Time {
	if q.Next.IsZero() {
		return now
	}
	return q.Next
}

// settle takes the answer in and says when to ask again. It reports whether that
// there is an answer, or what it is, changed; same compares two.
func (q *Query[T]) settle(now time.Time, answer T, err error, something bool, same func(a, b T) bool) (changed bool) {
	changed = err == nil && (!q.answered || !same(answer, q.answer)) || (err != nil) != (q.why.What != "")
	if q.why = failure.Problem(err); err == nil {
		q.answer, q.answered = answer, true
	}
	if err == nil && something {
		q.tries, q.Next = 0, now.Add(LookupInterval)
		return changed
	}
	q.Next = now.Add(min(lookupRetry<<min(q.tries, 10), LookupInterval))
	q.tries++
	return changed
}

// unanswered is why there is no answer: halted, what kept others from being
// asked, where it never had its turn.
func (q *Query[T]) unanswered(halted health.Problem) health.Problem {
	if q.why.What == "" && !q.answered {
		return halted
	}
	return q.why
}

// known copies the answers, which the view keeps. A question that was never
// answered is not in it.
func (l *Queries) known() Data {
	known := Data{
		VirtualIPs: make(map[registration.Service][]netip.Addr), GatewayPorts: make(map[registration.Gateway][]uint16), CheckPorts: l.checks.answer,
		Unanswered: make(map[registration.Service]health.Problem), NoIntentions: l.allowed.unanswered(l.halted),
		NoChecks: l.checks.unanswered(l.halted), NoNames: l.unnamed,
	}
	if l.allowed.answered {
		known.Intentions = append([]registration.Intention{}, l.allowed.answer...)
	}
	for of, question := range l.Virtual {
		if question.answered {
			known.VirtualIPs[of] = question.answer
		}
		if why := question.unanswered(l.halted); why.What != "" {
			known.Unanswered[of] = why
		}
	}
	for of, question := range l.Gateways {
		if question.answered {
			known.GatewayPorts[of] = question.answer
		}
		if why := question.unanswered(l.halted); why.What != "" {
			known.Unanswered[of.Service] = why
		}
	}
	return known
}

// Questions are what the proxies need to be asked, sorted. checks are the
// services whose checks are exposed.
func Questions(byAllocation map[string][]registration.Proxy, intentions []registration.Intention) (services []registration.Service, gateways []registration.Gateway, checks []string) {
	wanted, listening := make(map[registration.Service]bool), make(map[registration.Gateway]bool)
	for _, list := range byAllocation {
		for _, p := range list {
			for _, u := range p.Upstreams {
				if !u.Remote {
					wanted[u.Of] = true
				}
			}
			if p.Kind == registration.KindIngress || p.Kind == registration.KindAPI {
				listening[p.Entry()] = true
			}
			if p.ExposeCheck {
				checks = append(checks, p.ServiceID)
			}
		}
	}
	for _, of := range dialledServices(byAllocation, intentions) {
		wanted[of] = true
	}
	services = slices.SortedFunc(maps.Keys(wanted), compareServices)
	gateways = slices.SortedFunc(maps.Keys(listening), func(a, b registration.Gateway) int { return compareServices(a.Service, b.Service) })
	slices.Sort(checks)
	return services, gateways, checks
}

func compareServices(a, b registration.Service) int {
	return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Partition, b.Partition), strings.Compare(a.Peer, b.Peer))
}

// dialledServices are the services that intentions allow the transparent proxies of
// groups with several to dial, by name.
func dialledServices(byAllocation map[string][]registration.Proxy, intentions []registration.Intention) (services []registration.Service) {
	for alloc, list := range byAllocation {
		list = registration.Transparent(list)
		if alloc == "" || len(list) < 2 {
			continue
		}
		for _, allowed := range intentions {
			if slices.ContainsFunc(list, allowed.Names) {
				services = append(services, allowed.Destination)
			}
		}
	}
	return services
}

// Competing reports whether proxies of one allocation compete for virtual IPs:
// those of no allocation are not known to share one.
func Competing(byAllocation map[string][]registration.Proxy) bool {
	for alloc, list := range byAllocation {
		if alloc != "" && len(registration.Transparent(list)) > 1 {
			return true
		}
	}
	return false
}
