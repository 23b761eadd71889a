// SPDX-License-Identifier: MPL-2.0

package catalog

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/agent/wait"
	"github.com/weirmesh/weir/redirect/health"
)

// serviceList are the services that Consul's catalog has instances of: one blocking
// query for all. As long as a service has one, Consul keeps its virtual IP; when
// the last is gone the address may be another service's at once.
type serviceList struct {
	consul *Client
	moved  chan struct{} // the names are others now
	needed chan struct{} // closed when somebody wants to know
	Need   func()

	Mu     sync.Mutex
	known  map[string]Ignored // nil: they are not known
	why    health.Problem     // ... because of this
	Missed int                // times that something may have come and gone unseen
}

// Ignored takes what an answer says of a name, and keeps nothing of it.
type Ignored struct{}

// UnmarshalJSON is that of json.Unmarshaler.
func (*Ignored) UnmarshalJSON([]byte) error { return nil }

func NewServiceList(consul *Client) *serviceList {
	n := &serviceList{consul: consul, moved: make(chan struct{}, 1), needed: make(chan struct{})}
	n.Need = sync.OnceFunc(func() { close(n.needed) })
	return n
}

// Follow keeps the names until ctx ends, from when they are needed.
func (n *serviceList) Follow(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-n.needed:
	}
	var index uint64
	failures, lost := 0, false
	for {
		found, next, err := n.consul.Names(ctx, index)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			failures, lost, next = failures+1, lost || index > 0, 0
			n.tell(ConsulProblem(err))
			n.Set(nil, false)
		} else {
			n.tell(health.Problem{})
			n.Set(found, lost || next < index)
			failures, lost = 0, false
		}
		index = next
		if _, alive := wait.Pause(ctx, n.Rest(len(found), failures), nil); !alive {
			return
		}
	}
}

// Rest is the time between two questions: a large or busy catalog must not make
// the agent busy.
func (n *serviceList) Rest(services, failures int) time.Duration {
	const atLeast, each = time.Second, time.Millisecond
	switch {
	case failures > 0:
		return PollInterval{Failures: failures}.Pause(rand.Float64())
	case !n.consul.Config.Watch:
		return PollInterval{}.Pause(rand.Float64())
	}
	return time.Duration(float64(max(atLeast, time.Duration(services)*each)) * (0.5 + rand.Float64()))
}

// unknown is why the names are not known; nothing where they are, or nobody asked.
func (n *serviceList) unknown() health.Problem {
	n.Mu.Lock()
	defer n.Mu.Unlock()
	return n.why
}

// tell says why they are not known; nothing where they are.
func (n *serviceList) tell(why health.Problem) {
	n.Mu.Lock()
	turned := why != n.why
	n.why = why
	n.Mu.Unlock()
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

// Set takes an answer in; nil is none. missed says that it does not continue the
// one before.
func (n *serviceList) Set(found map[string]Ignored, missed bool) {
	n.Mu.Lock()
	same := !missed && (found == nil) == (n.known == nil) && maps.Equal(found, n.known)
	n.known = found
	if missed {
		n.Missed++
	}
	n.Mu.Unlock()
	if !same {
		n.signal()
	}
}

// Presence is what the names tell of a service.
type Presence int

const (
	PresenceUnknown Presence = iota
	Present
	Absent
)

// oneNamespace is the agent's own: Consul lists no names of all of them at once.
func oneNamespace(own string) string {
	if own == "*" {
		return "default"
	}
	return own
}

// Of tells of a service. The names are those of the agent's own namespace alone.
func (n *serviceList) Of(s registration.Service) Presence {
	n.Mu.Lock()
	defer n.Mu.Unlock()
	own := n.consul.Config
	if n.known == nil || s.Peer != "" || registration.ServiceOf("", s.Namespace, s.Partition) != registration.ServiceOf("", oneNamespace(own.Namespace), own.Partition) {
		return PresenceUnknown
	}
	if _, found := n.known[s.Name]; found {
		return Present
	}
	return Absent
}

// Names returns the services of the catalog when they may no longer be those of
// index, or after some minutes all the same.
func (c *Client) Names(ctx context.Context, index uint64) (found map[string]Ignored, next uint64, err error) {
	timeouts := c.Read
	if index > 0 && c.Config.Watch { // else there is nothing to wait for
		timeouts += c.Block + c.Block/8
	}
	ctx, cancel := context.WithTimeout(ctx, timeouts)
	defer cancel()
	options, err := c.Options(ctx)
	if err != nil {
		return nil, 0, err
	}
	options.Namespace = oneNamespace(options.Namespace)
	if c.Config.Watch {
		options.WaitIndex, options.WaitTime = index, c.Block
	}
	meta, err := c.Client.Raw().Query("/v1/catalog/services", &found, options)
	if err == nil && (found == nil || meta.LastIndex == 0) {
		err = errors.New("the answer is empty, or has no index")
	}
	if err != nil {
		return nil, 0, fmt.Errorf("read names of services from Consul: %w", Brief(err))
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

// OnCatalogChange lets those be asked at once whose service came to the catalog or went,
// and all of them, one after the other, where that may have been missed.
func (l *Queries) OnCatalogChange() {
	l.Names.Mu.Lock()
	missed := l.Names.Missed - l.missed
	l.missed += missed
	l.Names.Mu.Unlock()
	for of, question := range l.Virtual {
		if missed > 0 {
			question.Next = earlier(question.Next, l.Now().Add(rand.N(LookupInterval/10)))
		}
		now := l.Names.Of(of)
		if now == PresenceUnknown || now == question.Presence {
			continue
		}
		// What was answered before the names were known is right if the service
		// has instances.
		if first := question.Presence == PresenceUnknown; !first || now == Absent || len(question.answer) == 0 {
			question.Next, question.tries = time.Time{}, 0
		}
		question.Presence = now
	}
}

// ShortenDeadlines brings forward what may change without a sign. What was never asked has
// its turn at once.
func (l *Queries) ShortenDeadlines() {
	if len(l.Virtual) > 0 {
		l.Names.Need()
	}
	count, peers := 0, 0
	for of, question := range l.Virtual {
		if question.Presence == Absent {
			count++
		}
		if of.Peer != "" {
			peers++
		}
	}
	for of, question := range l.Virtual {
		if question.Presence == Absent {
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
