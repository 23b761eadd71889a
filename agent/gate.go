// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"log/slog"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/workload"
)

// How often the gates of new allocations are looked at, and those that are older.
const (
	gateInterval = 100 * time.Millisecond
	slowGate     = 500 * time.Millisecond
	newGate      = 5 * time.Second // since ADD
)

// gate is the start gate of an allocation: what its tasks dial waits until its
// proxy listens for the first time.
type gate struct {
	held  *redirect.Gate // nil: it is not open
	since time.Time      // of the allocation's ADD
	until time.Time      // when it closes whatever the proxy does
	over  bool           // the proxy listened, or the time is over: it does not open again
	seen  map[uint64]bool
}

// close lets nothing wait any more.
func (g *gate) close() error {
	if g.held == nil {
		return nil
	}
	held := g.held
	g.held, g.over = nil, true
	return held.Close()
}

// keepGate opens the gate of an allocation that was added a moment ago and is in
// transparent mode or has explicit upstreams, and closes that of one which has none.
func (a *Agent) keepGate(s desired.Allocation, m *allocState, now time.Time) {
	timeout := a.gateTimeout(s.Proxies)
	upstreams := heldUpstreams(s.Proxies)
	if m.hook == 0 || s.Record == nil || s.Record.Request.Mode != workload.ModeTransparent && len(upstreams) == 0 || timeout == 0 {
		a.closeGate(s.Key, m)
		return
	}
	m.gate.since, m.gate.until = s.Record.Added, s.Record.Added.Add(timeout)
	if m.gate.over || !now.Before(m.gate.until) {
		return
	}
	var err error
	if m.gate.held == nil {
		m.gate.held, err = a.datapath.OpenGate(s.Key)
		m.gate.seen = make(map[uint64]bool)
	}
	if err == nil {
		err = m.gate.held.Hold(upstreams)
	}
	if !ends(err) { // else it went meanwhile
		a.note(s.Key, m, "gate", err)
	}
}

// heldUpstreams are the local ports of explicit upstreams on which a proxy is to listen.
func heldUpstreams(proxies []registration.Proxy) (ports []uint16) {
	for _, p := range proxies {
		for _, u := range p.Upstreams {
			if u.Listener.Addr().Is4() && u.Listener.Addr().IsLoopback() {
				ports = append(ports, u.Listener.Port())
			}
		}
	}
	return ports
}

// gateTimeout is the node's, or what the job makes of it.
func (a *Agent) gateTimeout(proxies []registration.Proxy) time.Duration {
	timeout := a.config.Gate.Duration()
	for _, p := range proxies {
		if p.Gate != nil {
			timeout = min(timeout, *p.Gate)
		}
	}
	return timeout
}

func (a *Agent) closeGate(key workload.AttachmentID, m *allocState) {
	if err := m.gate.close(); err != nil {
		a.warnOnce("close the start gate of "+key.String(), err)
	}
}

// closeGates is for the end of the agent, and for allocations that it drops.
func (a *Agent) closeGates(stays func(workload.AttachmentID) bool) {
	for key, m := range a.allocations {
		if !stays(key) {
			a.closeGate(key, m)
		}
	}
}

// noteHeld counts the connections that a gate holds, each once.
func (a *Agent) noteHeld(m *allocState, state redirect.GateState) {
	for socket, event := range state.Waiting {
		if m.gate.seen[socket] {
			continue
		}
		m.gate.seen[socket] = true
		a.count(func(c *api.Counts) { c.Held++ })
		if a.flows != nil {
			a.flows.Note(event)
		}
	}
}

// lookAtGates closes the gates whose proxies listen or whose time is over, and
// counts what they hold. It returns when to look again.
func (a *Agent) lookAtGates(now time.Time) time.Duration {
	wait := tick
	var keys []workload.AttachmentID
	var gates []*redirect.Gate
	for key, m := range a.allocations {
		if m.gate.held != nil {
			keys, gates = append(keys, key), append(gates, m.gate.held)
		}
	}
	if len(gates) == 0 {
		return wait
	}
	states, errs := a.datapath.LookAtGates(gates)
	for i, key := range keys {
		m, state, err := a.allocations[key], states[i], errs[i]
		if err != nil && !ends(err) {
			a.note(key, m, "gate", err)
		}
		a.noteHeld(m, state)
		log := func(level slog.Level, what string) {
			a.log.Log(context.Background(), level, what, "alloc_id", key.ContainerID, "interface", key.IfName, "connections", len(m.gate.seen),
				"after", now.Sub(m.gate.since).Round(time.Millisecond))
		}
		switch {
		case ends(err):
		case state.Listens:
			log(slog.LevelInfo, "start gate closed: the proxy listens")
		case !now.Before(m.gate.until):
			a.count(func(c *api.Counts) { c.HeldTimeout += uint64(len(state.Waiting)) })
			log(slog.LevelWarn, "start gate closed: the proxy does not listen, what its tasks dial is refused")
		default:
			pace := slowGate
			if now.Sub(m.gate.since) < newGate {
				pace = gateInterval
			}
			wait = min(wait, pace, max(m.gate.until.Sub(now), time.Millisecond))
			continue
		}
		a.closeGate(key, m)
		a.trigger() // it is shown
	}
	return wait
}
