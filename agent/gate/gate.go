// SPDX-License-Identifier: MPL-2.0

// Package gate keeps the start gate of an allocation: what its tasks dial waits until its
// proxy listens for the first time.
package gate

import (
	"time"

	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/monitor"
)

// How often the gates of new allocations are looked at, and those that are older.
const (
	interval     = 100 * time.Millisecond
	slowInterval = 500 * time.Millisecond
	young        = 5 * time.Second // since ADD
)

// Gate is that of one allocation. It is closed at first.
type Gate struct {
	held  *redirect.Gate // nil: it is not open
	since time.Time      // of the allocation's ADD
	until time.Time      // when it closes whatever the proxy does
	over  bool           // the proxy listened, or the time is over: it does not open again
	seen  map[uint64]bool
}

// Held is what holds connections; nil where nothing does.
func (g *Gate) Held() *redirect.Gate { return g.held }

// Since is when the allocation was added.
func (g *Gate) Since() time.Time { return g.since }

// Connections is how many it has held.
func (g *Gate) Connections() int { return len(g.seen) }

// Over reports whether its time is.
func (g *Gate) Over(now time.Time) bool { return !now.Before(g.until) }

// Keep opens the gate of an allocation that was added a moment ago, and holds the local
// ports of its explicit upstreams too.
func (g *Gate) Keep(open func() (*redirect.Gate, error), added time.Time, timeout time.Duration, upstreams []uint16, now time.Time) error {
	g.since, g.until = added, added.Add(timeout)
	if g.over || g.Over(now) {
		return nil
	}
	if g.held == nil {
		held, err := open()
		g.held, g.seen = held, make(map[uint64]bool)
		if err != nil {
			return err
		}
	}
	return g.held.Hold(upstreams)
}

// Close lets nothing wait any more.
func (g *Gate) Close() error {
	if g.held == nil {
		return nil
	}
	held := g.held
	g.held, g.over = nil, true
	return held.Close()
}

// Waiting tells the connections that wait and were not told yet.
func (g *Gate) Waiting(state redirect.GateState) (events []monitor.Event) {
	for socket, event := range state.Waiting {
		if !g.seen[socket] {
			g.seen[socket] = true
			events = append(events, event)
		}
	}
	return events
}

// Pause is how long until an open gate is looked at again.
func (g *Gate) Pause(now time.Time) time.Duration {
	pace := slowInterval
	if now.Sub(g.since) < young {
		pace = interval
	}
	return min(pace, max(g.until.Sub(now), time.Millisecond))
}

// Upstreams are the local ports of explicit upstreams on which a proxy is to listen.
func Upstreams(proxies []registration.Proxy) (ports []uint16) {
	for _, p := range proxies {
		for _, u := range p.Upstreams {
			if u.Listener.Addr().Is4() && u.Listener.Addr().IsLoopback() {
				ports = append(ports, u.Listener.Port())
			}
		}
	}
	return ports
}

// Timeout is the node's, or what the job makes of it.
func Timeout(ofNode time.Duration, proxies []registration.Proxy) time.Duration {
	for _, p := range proxies {
		if p.Gate != nil {
			ofNode = min(ofNode, *p.Gate)
		}
	}
	return ofNode
}
