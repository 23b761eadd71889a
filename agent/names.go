// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/weirmesh/weir/redirect/health"
)

// serviceList are the services that Consul's catalog has instances of: one blocking
// query for all. As long as a service has one, Consul keeps its virtual IP; when
// the last is gone the address may be another service's at once.
type serviceList struct {
	consul *consul
	moved  chan struct{} // the names are others now
	needed chan struct{} // closed when somebody wants to know
	need   func()

	mu     sync.Mutex
	known  map[string]ignored // nil: they are not known
	why    health.Problem     // ... because of this
	missed int                // times that something may have come and gone unseen
}

// ignored takes what an answer says of a name, and keeps nothing of it.
type ignored struct{}

// UnmarshalJSON is that of json.Unmarshaler.
func (*ignored) UnmarshalJSON([]byte) error { return nil }

func newServiceList(consul *consul) *serviceList {
	n := &serviceList{consul: consul, moved: make(chan struct{}, 1), needed: make(chan struct{})}
	n.need = sync.OnceFunc(func() { close(n.needed) })
	return n
}

// follow keeps the names until ctx ends, from when they are needed.
func (n *serviceList) follow(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-n.needed:
	}
	var index uint64
	failures, lost := 0, false
	for {
		found, next, err := n.consul.names(ctx, index)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			failures, lost, next = failures+1, lost || index > 0, 0
			n.tell(consulProblem(err))
			n.set(nil, false)
		} else {
			n.tell(health.Problem{})
			n.set(found, lost || next < index)
			failures, lost = 0, false
		}
		index = next
		if _, alive := pause(ctx, n.rest(len(found), failures), nil); !alive {
			return
		}
	}
}

// rest is the time between two questions: a large or busy catalog must not make
// the agent busy.
func (n *serviceList) rest(services, failures int) time.Duration {
	const atLeast, each = time.Second, time.Millisecond
	switch {
	case failures > 0:
		return pollInterval{failures: failures}.pause(rand.Float64())
	case !n.consul.config.Watch:
		return pollInterval{}.pause(rand.Float64())
	}
	return time.Duration(float64(max(atLeast, time.Duration(services)*each)) * (0.5 + rand.Float64()))
}

// unknown is why the names are not known; nothing where they are, or nobody asked.
func (n *serviceList) unknown() health.Problem {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.why
}

// tell says why they are not known; nothing where they are.
func (n *serviceList) tell(why health.Problem) {
	n.mu.Lock()
	turned := why != n.why
	n.why = why
	n.mu.Unlock()
	if turned {
		n.signal()
	}
}

func (n *serviceList) signal() {
	select {
	case n.moved <- struct{}{}:
	default:
	}
}

// set takes an answer in; nil is none. missed says that it does not continue the
// one before.
func (n *serviceList) set(found map[string]ignored, missed bool) {
	n.mu.Lock()
	same := !missed && (found == nil) == (n.known == nil) && maps.Equal(found, n.known)
	n.known = found
	if missed {
		n.missed++
	}
	n.mu.Unlock()
	if !same {
		n.signal()
	}
}

// presence is what the names tell of a service.
type presence int

const (
	presenceUnknown presence = iota
	present
	absent
)

// oneNamespace is the agent's own: Consul lists no names of all of them at once.
func oneNamespace(own string) string {
	if own == "*" {
		return "default"
	}
	return own
}

// of tells of a service. The names are those of the agent's own namespace alone.
func (n *serviceList) of(s service) presence {
	n.mu.Lock()
	defer n.mu.Unlock()
	own := n.consul.config
	if n.known == nil || s.Peer != "" || serviceOf("", s.Namespace, s.Partition) != serviceOf("", oneNamespace(own.Namespace), own.Partition) {
		return presenceUnknown
	}
	if _, found := n.known[s.Name]; found {
		return present
	}
	return absent
}

// names returns the services of the catalog when they may no longer be those of
// index, or after some minutes all the same.
func (c *consul) names(ctx context.Context, index uint64) (found map[string]ignored, next uint64, err error) {
	timeouts := c.read
	if index > 0 && c.config.Watch { // else there is nothing to wait for
		timeouts += c.block + c.block/8
	}
	ctx, cancel := context.WithTimeout(ctx, timeouts)
	defer cancel()
	options, err := c.options(ctx)
	if err != nil {
		return nil, 0, err
	}
	options.Namespace = oneNamespace(options.Namespace)
	if c.config.Watch {
		options.WaitIndex, options.WaitTime = index, c.block
	}
	meta, err := c.client.Raw().Query("/v1/catalog/services", &found, options)
	if err == nil && (found == nil || meta.LastIndex == 0) {
		err = errors.New("the answer is empty, or has no index")
	}
	if err != nil {
		return nil, 0, fmt.Errorf("read names of services from Consul: %w", brief(err))
	}
	return found, meta.LastIndex, nil
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

// onCatalogChange lets those be asked at once whose service came to the catalog or went,
// and all of them, one after the other, where that may have been missed.
func (l *queries) onCatalogChange() {
	l.names.mu.Lock()
	missed := l.names.missed - l.missed
	l.missed += missed
	l.names.mu.Unlock()
	for of, question := range l.virtual {
		if missed > 0 {
			question.next = earlier(question.next, l.now().Add(rand.N(lookupInterval/10)))
		}
		now := l.names.of(of)
		if now == presenceUnknown || now == question.presence {
			continue
		}
		// What was answered before the names were known is right if the service
		// has instances.
		if first := question.presence == presenceUnknown; !first || now == absent || len(question.answer) == 0 {
			question.next, question.tries = time.Time{}, 0
		}
		question.presence = now
	}
}

// shortenDeadlines brings forward what may change without a sign. What was never asked has
// its turn at once.
func (l *queries) shortenDeadlines() {
	if len(l.virtual) > 0 {
		l.names.need()
	}
	count, peers := 0, 0
	for of, question := range l.virtual {
		if question.presence == absent {
			count++
		}
		if of.Peer != "" {
			peers++
		}
	}
	for of, question := range l.virtual {
		if question.presence == absent {
			question.next = earlier(question.next, l.now().Add(absentInterval(count)))
		}
		if of.Peer != "" {
			question.next = earlier(question.next, l.now().Add(peerInterval(peers)))
		}
	}
	for _, question := range l.gateways {
		question.next = earlier(question.next, l.now().Add(gatewayInterval(len(l.gateways))))
	}
}
