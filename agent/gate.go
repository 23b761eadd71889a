// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"log/slog"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/gate"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/workload"
)

// keepGate opens the gate of an allocation that was added a moment ago and is in
// transparent mode or has explicit upstreams, and closes that of one which has none.
func (a *Agent) keepGate(s desired.Allocation, m *allocState, now time.Time) {
	timeout, upstreams := gate.Timeout(a.config.Gate.Duration(), s.Proxies), gate.Upstreams(s.Proxies)
	if m.hook == 0 || s.Record == nil || s.Record.Request.Mode != workload.ModeTransparent && len(upstreams) == 0 || timeout == 0 {
		a.closeGate(s.Key, m)
		return
	}
	open := func() (*redirect.Gate, error) { return a.datapath.OpenGate(s.Key) }
	if err := m.gate.Keep(open, s.Record.Added, timeout, upstreams, now); !ends(err) { // else it went meanwhile
		a.note(s.Key, m, "gate", err)
	}
}

func (a *Agent) closeGate(key workload.AttachmentID, m *allocState) {
	if err := m.gate.Close(); err != nil {
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
	for _, event := range m.gate.Waiting(state) {
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
		if held := m.gate.Held(); held != nil {
			keys, gates = append(keys, key), append(gates, held)
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
			a.log.Log(context.Background(), level, what, "alloc_id", key.ContainerID, "interface", key.IfName, "connections", m.gate.Connections(),
				"after", now.Sub(m.gate.Since()).Round(time.Millisecond))
		}
		switch {
		case ends(err):
		case state.Listens:
			log(slog.LevelInfo, "start gate closed: the proxy listens")
		case m.gate.Over(now):
			a.count(func(c *api.Counts) { c.HeldTimeout += uint64(len(state.Waiting)) })
			log(slog.LevelWarn, "start gate closed: the proxy does not listen, what its tasks dial is refused")
		default:
			wait = min(wait, m.gate.Pause(now))
			continue
		}
		a.closeGate(key, m)
		a.trigger() // it is shown
	}
	return wait
}
