// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/redirect/health"
)

// queries are the questions that the bulk read leaves open: virtual IPs of
// upstreams, listeners of gateways, exposed checks. Each is asked once for all
// proxies, seldom while it has an answer, ever more seldom while not, and at once
// where there is a sign that the answer is another.
type queries struct {
	consul *consul
	now    func() time.Time
	names  *serviceList
	missed int // of names, as heeded

	virtual  map[service]*query[[]netip.Addr]
	gateways map[gateway]*query[[]uint16]
	checks   query[map[string][]uint16]
	allowed  query[[]intention]
	exposed  []string       // services whose checks were asked for
	unnamed  health.Problem // why nobody tells which services come and go
	halted   health.Problem // what ended the last pass before every question had its turn
	due      time.Time      // when the next question is; zero: there is none
}

// query is one question.
type query[T any] struct {
	answer   T
	answered bool           // once at least: nothing is an answer too
	why      health.Problem // there is no answer
	next     time.Time      // when to ask again
	tries    int            // in a row without an answer
	presence presence       // of the service, as heeded
}

const (
	lookupsAtOnce    = 256
	lookupInterval   = 5 * time.Minute
	lookupRetry      = 2 * time.Second
	listenerInterval = 30 * time.Second // of what may change without a sign
)

func newQueries(consul *consul) *queries {
	return &queries{
		consul: consul, now: time.Now, names: newServiceList(consul),
		virtual: make(map[service]*query[[]netip.Addr]), gateways: make(map[gateway]*query[[]uint16]),
	}
}

// refresh asks what is due for these proxies, and returns what is known and
// whether any of it moved. An error ends the pass, but for one that concerns
// the question alone; what was known stays.
func (l *queries) refresh(ctx context.Context, byAllocation map[string][]proxy) (known catalogData, moved bool) {
	left := lookupsAtOnce
	var failed health.Problem
	halted := func() bool { return failed.What != "" }
	heard := func(err error) {
		if !concernsOne(err) {
			failed = consulProblem(err)
		}
	}
	due := func(next time.Time) bool {
		if halted() || left == 0 || l.now().Before(next) {
			return false
		}
		left--
		return true
	}
	compete := competing(byAllocation)
	if compete && due(l.allowed.next) {
		answer, err := l.consul.intentions(ctx)
		moved = l.allowed.settle(l.now(), answer, err, len(answer) > 0, slices.Equal)
		l.allowed.next = earlier(l.allowed.next, l.now().Add(listenerInterval))
		heard(err)
	}
	services, gateways, checks := questions(byAllocation, l.allowed.answer)
	maps.DeleteFunc(l.virtual, func(of service, _ *query[[]netip.Addr]) bool {
		_, wanted := slices.BinarySearchFunc(services, of, compareServices)
		return !wanted
	})
	maps.DeleteFunc(l.gateways, func(of gateway, _ *query[[]uint16]) bool { return !slices.Contains(gateways, of) })
	l.onCatalogChange()
	for _, of := range services {
		question := l.virtual[of]
		if question == nil {
			question = &query[[]netip.Addr]{presence: l.names.of(of)}
			l.virtual[of] = question
		}
		if due(question.next) {
			texts, err := l.consul.virtualIPs(ctx, of)
			answer := parseAddresses(texts)
			moved = question.settle(l.now(), answer, err, len(answer) > 0, slices.Equal) || moved
			heard(err)
		}
	}
	for _, of := range gateways {
		question := l.gateways[of]
		if question == nil {
			question = new(query[[]uint16])
			l.gateways[of] = question
		}
		if due(question.next) {
			answer, err := l.consul.gatewayPorts(ctx, of)
			moved = question.settle(l.now(), answer, err, len(answer) > 0, slices.Equal) || moved
			heard(err)
		}
	}
	if !slices.Equal(checks, l.exposed) {
		l.exposed, l.checks.next, l.checks.tries = checks, time.Time{}, 0
	}
	if len(checks) > 0 && due(l.checks.next) {
		answer, err := l.consul.checks(ctx)
		same := func(a, b map[string][]uint16) bool { return maps.EqualFunc(a, b, slices.Equal[[]uint16]) }
		missing := func(id string) bool { return len(answer[id]) == 0 }
		moved = l.checks.settle(l.now(), answer, err, !slices.ContainsFunc(checks, missing), same) || moved
		l.checks.next = earlier(l.checks.next, l.now().Add(listenerInterval))
		heard(err)
	}
	l.shortenDeadlines()
	unnamed := l.names.unknown()
	moved = moved || failed != l.halted || unnamed != l.unnamed
	l.halted, l.unnamed = failed, unnamed
	l.due = time.Time{}
	for _, question := range l.virtual {
		l.due = sooner(l.due, question.turn(l.now()))
	}
	for _, question := range l.gateways {
		l.due = sooner(l.due, question.turn(l.now()))
	}
	if compete {
		l.due = sooner(l.due, l.allowed.turn(l.now()))
	}
	if len(checks) > 0 {
		l.due = sooner(l.due, l.checks.turn(l.now()))
	}
	if halted() { // whoever comes next would fare no better
		l.due = l.now().Add(listenerInterval)
	}
	return l.known(), moved
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
func (q *query[T]) turn(now time.Time) time.Time {
	if q.next.IsZero() {
		return now
	}
	return q.next
}

// settle takes the answer in and says when to ask again. It reports whether that
// there is an answer, or what it is, changed; same compares two.
func (q *query[T]) settle(now time.Time, answer T, err error, something bool, same func(a, b T) bool) (changed bool) {
	changed = err == nil && (!q.answered || !same(answer, q.answer)) || (err != nil) != (q.why.What != "")
	if q.why = consulProblem(err); err == nil {
		q.answer, q.answered = answer, true
	}
	if err == nil && something {
		q.tries, q.next = 0, now.Add(lookupInterval)
		return changed
	}
	q.next = now.Add(min(lookupRetry<<min(q.tries, 10), lookupInterval))
	q.tries++
	return changed
}

// unanswered is why there is no answer: halted, what kept others from being
// asked, where it never had its turn.
func (q *query[T]) unanswered(halted health.Problem) health.Problem {
	if q.why.What == "" && !q.answered {
		return halted
	}
	return q.why
}

// known copies the answers, which the view keeps. A question that was never
// answered is not in it.
func (l *queries) known() catalogData {
	known := catalogData{
		VirtualIPs: make(map[service][]netip.Addr), GatewayPorts: make(map[gateway][]uint16), CheckPorts: l.checks.answer,
		Unanswered: make(map[service]health.Problem), NoIntentions: l.allowed.unanswered(l.halted),
		NoChecks: l.checks.unanswered(l.halted), NoNames: l.unnamed,
	}
	if l.allowed.answered {
		known.Intentions = append([]intention{}, l.allowed.answer...)
	}
	for of, question := range l.virtual {
		if question.answered {
			known.VirtualIPs[of] = question.answer
		}
		if why := question.unanswered(l.halted); why.What != "" {
			known.Unanswered[of] = why
		}
	}
	for of, question := range l.gateways {
		if question.answered {
			known.GatewayPorts[of] = question.answer
		}
		if why := question.unanswered(l.halted); why.What != "" {
			known.Unanswered[of.service] = why
		}
	}
	return known
}

// questions are what the proxies need to be asked, sorted. checks are the
// services whose checks are exposed.
func questions(byAllocation map[string][]proxy, intentions []intention) (services []service, gateways []gateway, checks []string) {
	wanted, listening := make(map[service]bool), make(map[gateway]bool)
	for _, list := range byAllocation {
		for _, p := range list {
			for _, u := range p.Upstreams {
				if !u.Remote {
					wanted[u.Of] = true
				}
			}
			if p.Kind == kindIngress || p.Kind == kindAPI {
				listening[p.entry()] = true
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
	gateways = slices.SortedFunc(maps.Keys(listening), func(a, b gateway) int { return compareServices(a.service, b.service) })
	slices.Sort(checks)
	return services, gateways, checks
}

func compareServices(a, b service) int {
	return strings.Compare(a.Partition+"/"+a.Namespace+"/"+a.Name+"/"+a.Peer, b.Partition+"/"+b.Namespace+"/"+b.Name+"/"+b.Peer)
}

// dialledServices are the services that intentions allow the transparent proxies of
// groups with several to dial, by name.
func dialledServices(byAllocation map[string][]proxy, intentions []intention) (services []service) {
	for alloc, list := range byAllocation {
		list = transparent(list)
		if alloc == "" || len(list) < 2 {
			continue
		}
		for _, allowed := range intentions {
			if slices.ContainsFunc(list, allowed.names) {
				services = append(services, allowed.Destination)
			}
		}
	}
	return services
}

// competing reports whether proxies of one allocation compete for virtual IPs:
// those of no allocation are not known to share one.
func competing(byAllocation map[string][]proxy) bool {
	for alloc, list := range byAllocation {
		if alloc != "" && len(transparent(list)) > 1 {
			return true
		}
	}
	return false
}
