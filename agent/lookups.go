// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// lookups are the questions that the bulk read leaves open: virtual IPs of
// upstreams, listeners of gateways, exposed checks. Each is asked once for all
// proxies, seldom while it has an answer, and ever more seldom while not.
type lookups struct {
	consul *consul
	now    func() time.Time

	virtual  map[service]*lookup[[]netip.Addr]
	gateways map[service]*lookup[[]uint16]
	checks   lookup[map[string][]uint16]
	more     bool // refresh stopped before the end
}

// lookup is one question.
type lookup[T any] struct {
	answer T
	why    string    // there is no answer
	next   time.Time // when to ask again
	tries  int       // in a row without an answer
}

const (
	lookupsAtOnce  = 256
	lookupInterval = 5 * time.Minute
	lookupRetry    = 2 * time.Second
	checkInterval  = 15 * time.Second
)

func newLookups(consul *consul) *lookups {
	return &lookups{
		consul: consul, now: time.Now,
		virtual: make(map[service]*lookup[[]netip.Addr]), gateways: make(map[service]*lookup[[]uint16]),
	}
}

// refresh asks what is due for these proxies, and returns what is known and
// whether any of it moved. An error ends the pass, but for one that concerns
// the question alone; what was known stays.
func (l *lookups) refresh(ctx context.Context, byAllocation map[string][]proxy) (known facts, moved bool) {
	services, gateways, checks := questions(byAllocation)
	maps.DeleteFunc(l.virtual, func(of service, _ *lookup[[]netip.Addr]) bool { return !slices.Contains(services, of) })
	maps.DeleteFunc(l.gateways, func(of service, _ *lookup[[]uint16]) bool { return !slices.Contains(gateways, of) })
	left, failed := lookupsAtOnce, false
	l.more = false
	due := func(next time.Time) bool {
		if failed || l.now().Before(next) {
			return false
		}
		left--
		l.more = l.more || left < 0
		return left >= 0
	}
	for _, of := range services {
		question := l.virtual[of]
		if question == nil {
			question = new(lookup[[]netip.Addr])
			l.virtual[of] = question
		}
		if due(question.next) {
			texts, err := l.consul.virtualIPs(ctx, of)
			answer := parseAddresses(texts)
			changed := err == nil && !slices.Equal(answer, question.answer) || (err != nil) != (question.why != "")
			question.settle(l.now(), answer, err, len(answer) > 0)
			moved, failed = moved || changed, failed || !concernsOne(err)
		}
	}
	for _, of := range gateways {
		question := l.gateways[of]
		if question == nil {
			question = new(lookup[[]uint16])
			l.gateways[of] = question
		}
		if due(question.next) {
			answer, err := l.consul.gatewayPorts(ctx, of)
			changed := err == nil && !slices.Equal(answer, question.answer) || (err != nil) != (question.why != "")
			question.settle(l.now(), answer, err, len(answer) > 0)
			moved, failed = moved || changed, failed || !concernsOne(err)
		}
	}
	if checks && due(l.checks.next) {
		answer, err := l.consul.checks(ctx)
		changed := err == nil && !maps.EqualFunc(answer, l.checks.answer, slices.Equal[[]uint16])
		l.checks.settle(l.now(), answer, err, len(answer) > 0)
		l.checks.next = l.now().Add(checkInterval)
		moved = moved || changed
	}
	return l.known(), moved
}

// settle takes the answer in and says when to ask again.
func (q *lookup[T]) settle(now time.Time, answer T, err error, something bool) {
	q.why = ""
	if err == nil {
		q.answer = answer
	} else {
		q.why = err.Error()
	}
	if err == nil && something {
		q.tries, q.next = 0, now.Add(lookupInterval)
		return
	}
	q.next = now.Add(min(lookupRetry<<min(q.tries, 10), lookupInterval))
	q.tries++
}

// known copies the answers, which the view keeps.
func (l *lookups) known() facts {
	known := facts{
		VirtualIPs: make(map[service][]netip.Addr), GatewayPorts: make(map[service][]uint16), CheckPorts: l.checks.answer,
		Unanswered: make(map[service]string),
	}
	for of, question := range l.virtual {
		known.VirtualIPs[of] = question.answer
		if question.why != "" {
			known.Unanswered[of] = question.why
		}
	}
	for of, question := range l.gateways {
		known.GatewayPorts[of] = question.answer
		if question.why != "" {
			known.Unanswered[of] = question.why
		}
	}
	return known
}

// questions are what the proxies need to be asked, sorted.
func questions(byAllocation map[string][]proxy) (services, gateways []service, checks bool) {
	wanted, listening := make(map[service]bool), make(map[service]bool)
	for _, list := range byAllocation {
		for _, p := range list {
			for _, u := range p.Upstreams {
				if !u.Remote {
					wanted[u.Of] = true
				}
			}
			if p.Kind == kindIngress || p.Kind == kindAPI {
				listening[p.Self] = true
			}
			checks = checks || p.ExposeCheck
		}
	}
	order := func(a, b service) int {
		return strings.Compare(a.Partition+"/"+a.Namespace+"/"+a.Name, b.Partition+"/"+b.Namespace+"/"+b.Name)
	}
	return slices.SortedFunc(maps.Keys(wanted), order), slices.SortedFunc(maps.Keys(listening), order), checks
}
