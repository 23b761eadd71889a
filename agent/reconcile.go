// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"cmp"
	"errors"
	"slices"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/gate"
	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/listening"
	"github.com/weirmesh/weir/agent/refusal"
	"github.com/weirmesh/weir/agent/retry"
	"github.com/weirmesh/weir/agent/view"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// allocState is what the loop remembers of an attachment.
type allocState struct {
	view     api.WorkloadView
	born     time.Time      // when it was first seen
	cached   bool           // libcni knew it in the last pass
	ended    time.Time      // when libcni forgot it; zero: it did not
	record   inspect.Record // the last that it had; none: of no key
	fresh    bool           // this pass made its record, and the next one reads it
	place    discover.Place // where its namespace was last seen
	hook     uint64         // cookie of the namespace whose lookup program should be in force; 0: none
	looked   time.Time      // for Consul's own rules
	settled  time.Time      // when what is wanted of it was last seen to be in force; zero: not yet
	proxies  listening.Proxies
	identity identity.Memory  // of its registrations and tasks
	refused  refusal.Refusals // for a fault
	gate     gate.Gate
	missing  time.Time // since when its record is missing; zero: it is not
	steps    retry.Steps
}

// recordGrace is how long a record may be missing before it counts as lost:
// at DEL, libcni forgets an allocation after the plugin has.
const recordGrace = api.SettleTime

var errRecordMissing = errors.New("its record is missing: it ends, or somebody removed the record")

// reconcile compares everything with everything and applies what differs.
func (a *Agent) reconcile(now time.Time) {
	a.arrived.Store(false)
	cached, unreadable, err := a.cache.Read()
	if err != nil {
		a.blind("discover allocations", err)
		return
	}
	known, err := a.records.Records()
	noRecords := err
	if err != nil && !errors.Is(err, store.ErrUnreadable) {
		a.blind("read records", err) // all of them would look like lost ones
		return
	}
	if err != nil {
		unreadable = append(unreadable, err.Error())
	}
	consul := a.consulNow()
	a.noticed = consul.Noticed
	a.flows.Learn(known, consul)
	if a.consul != nil {
		a.told.Consul(consul)
	}
	if err := a.spaces.Find(a.config.CNI.NetNSDir, a.containers()); err != nil {
		unreadable = append(unreadable, err.Error())
	}
	a.mu.Lock()
	a.discoveryError, a.unreadable, a.unseen.Records = "", unreadable, inspect.UnreadableRecords(noRecords)
	a.mu.Unlock()
	skipped := slices.Concat(unreadable, consul.Problems)
	if problem := a.containers().Error; problem != "" {
		skipped = append(skipped, problem)
	}
	a.told.Unreadable(skipped)
	allocations := desired.Gather(cached, known, a.spaces, consul)
	a.watcher.More = desired.DirectoriesOf(allocations)
	a.identify(allocations, consul.Facts, now)
	a.byUrgency(allocations)
	a.budget.Begin(time.Now())
	moves := make([]*move, 0, len(allocations))
	for _, s := range allocations {
		moves = append(moves, a.begin(s, consul, now))
	}
	a.awaitRegistration(allocations, now)
	a.addAll(moves)
	for _, v := range moves {
		if !v.changes { // a start gate waits for no change of others
			a.conclude(v, consul, now)
		}
	}
	for _, v := range a.applyAll(moves) {
		a.conclude(v, consul, now)
	}
	a.forget(allocations, now)
	a.followNetworks(known)
	if a.cache.Halfway || a.budget.Left() > 0 {
		a.trigger()
	}
	a.publish(a.unmatched.Lines(allocations, consul, a.containers(), now))
	a.seen = true
}

// blind tells that nothing can be said of the node's allocations.
func (a *Agent) blind(what string, err error) {
	a.warnOnce(what, err)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.discoveryError = err.Error()
}

// containers is what Docker knows.
func (a *Agent) containers() discover.Containers {
	if a.docker == nil {
		return discover.Containers{}
	}
	return a.docker.Current()
}

// move is what one pass does for an attachment.
type move struct {
	s       desired.Allocation
	m       *allocState
	wanted  desired.Plan
	state   api.State
	joins   bool // it is to be put under Weir
	changes bool // its mesh configuration is another one than that in force
	inForce bool // what is wanted is in force

	difference string // in words, between what was in force and what is
}

// begin says what is to be done for an attachment. What goes wrong concerns it alone and
// is tried again.
func (a *Agent) begin(s desired.Allocation, consul catalog.Snapshot, now time.Time) *move {
	m := a.stateOf(s.Key, now)
	m.fresh = false
	v := &move{s: s, m: m, wanted: desired.For(s, consul.Facts, a.policy())}
	v.state = a.ensureAdded(v, consul.Facts, now)
	v.changes = v.state == api.StateManaged && v.wanted.MeshConfig != nil && !m.fresh && a.differs(s, m, *v.wanted.MeshConfig)
	v.inForce = !m.fresh && !v.changes
	if v.state == api.StateManaged && v.inForce {
		a.settle(m, false)
	}
	return v
}

// policy is the operator's part of what is desired.
func (a *Agent) policy() desired.Policy {
	return desired.Policy{Guard: workload.Guard(a.config.Guard.Default), Egress: workload.Guard(a.config.Guard.Egress), Forward: a.config.Guard.Forward, ProxyUID: a.config.Proxy.DefaultUID}
}

// problemsOf is what is wrong with an attachment.
func (a *Agent) problemsOf(v *move, consul catalog.Snapshot, now time.Time) []health.Problem {
	s, m, state := v.s, v.m, v.state
	problems := slices.Concat(v.wanted.Problems, m.steps.Problems())
	if s.Live && !s.Cached && state == api.StateManaged && len(s.Proxies) > 0 {
		problems = append(problems, discover.WithoutResult())
	}
	if state == api.StateEnded {
		problems = []health.Problem{discover.LeftBehind()}
	}
	problems = append(problems, m.proxies.Problems(state == api.StateManaged)...)
	if state == api.StateManaged {
		problems = append(problems, m.refused.Problems(a.refusedAgain(m, s, now))...)
	}
	return append(problems, m.identity.Missing(s, state, consul, now)...)
}

// conclude says how an attachment is now.
func (a *Agent) conclude(v *move, consul catalog.Snapshot, now time.Time) {
	s, m, state := v.s, v.m, v.state
	next := view.Of(s, state, v.wanted, a.problemsOf(v, consul, now), consul.Facts)
	next.InSync = state == api.StateManaged && len(s.Proxies) > 0 && consul.InSync && m.steps.Well() && v.inForce
	next.Task, m.proxies.Registered = m.proxies.Tasks(), s.Proxies
	next.Since = m.view.Since
	if next.InSync != m.view.InSync || next.State != m.view.State {
		next.Since = now
	}
	added := state == api.StateManaged && (v.joins || s.Record == nil)                // by this pass
	if a.seen || added || s.Record != nil && s.Record.Added.After(a.status.Started) { // else it is as it was before this agent
		a.changes.State(m.view, next, now)
	}
	if v.difference != "" {
		a.changes.Workload(next, api.ChangeConfig, v.difference, now)
	}
	if next.State != m.view.State && next.State != api.StateOutside {
		a.log.Info("workload "+string(next.State), "alloc_id", s.Key.ContainerID, "interface", s.Key.IfName, "namespace", s.Job.Namespace, "job", s.Job.ID, "task_group", s.Job.Group, "problems", next.Problems)
	}
	before := m.hook
	m.view, m.hook = next, 0
	if state == api.StateManaged && s.Record != nil {
		m.hook = s.Record.Cookie
	}
	if m.hook != before {
		m.proxies.Renew(now)
		m.refused = refusal.Refusals{}
		a.closeGate(s.Key, m)
		m.gate = gate.Gate{}
	}
	a.keepGate(s, m, now)
	if m.gate.Held() != nil {
		m.view.HeldSince = m.gate.Since()
	}
}

// ensureAdded sees to it that a mesh allocation is under Weir and under the right
// namespace, and says where it is. One that was found without a plugin joins later, with
// others.
func (a *Agent) ensureAdded(v *move, known catalog.Data, now time.Time) api.State {
	s, m, wanted := v.s, v.m, v.wanted
	switch {
	case s.Record != nil:
		m.record, m.missing = *s.Record, time.Time{}
		a.note(s.Key, m, "record", nil)
		return a.followNamespace(s, m, wanted, now)
	case s.Over() && (s.Asked() || wanted.Add != nil):
		m.steps.Clear()
		m.missing = time.Time{}
		return api.StateEnded
	case s.Asked():
		if m.view.State == api.StateConsul && now.Sub(m.looked) < resync {
			return api.StateConsul
		}
		m.looked = now
		foreign, err := host.RedirectedByConsul(s.NetNS)
		a.note(s.Key, m, "namespace", err)
		if err != nil {
			return api.StateUnprotected
		}
		if foreign {
			return api.StateConsul
		}
		if m.missing.IsZero() {
			m.missing = now
		}
		if now.Sub(m.missing) < recordGrace {
			m.steps.Await("record", errRecordMissing, m.missing.Add(recordGrace))
			if m.view.State != "" {
				return m.view.State // it may be on its way out
			}
			return api.StateUnprotected
		}
		return a.restore(s, m, known)
	case wanted.Add != nil && !s.Cached && now.Sub(m.ended) < recordGrace:
		return m.view.State // it is on its way out
	case wanted.Add != nil:
		v.joins = true
		return api.StateUnprotected // until then
	}
	return api.StateOutside
}

// restore makes anew the record of an allocation that has lost it.
func (a *Agent) restore(s desired.Allocation, m *allocState, known catalog.Data) api.State {
	assigned, err := host.Addresses(s.NetNS)
	if err != nil {
		a.note(s.Key, m, "namespace", err)
		return api.StateUnprotected
	}
	asked, err := desired.LostRequest(s.Attachment, assigned, a.policyDir)
	a.note(s.Key, m, "record", err)
	if err != nil {
		return api.StateUnprotected
	}
	m.fresh = true
	meshConfig := desired.Restored(s, asked, m.record, known, a.policy())
	return a.add(s, m, redirect.Attachment{Request: *asked, MeshConfig: &meshConfig, RejectedCgroups: m.record.RejectedCgroups}, "record was lost: made anew")
}

// followNamespace keeps a workload on record in sync with its namespace: another one
// under the same ID is guarded at once, with the addresses that it has by then.
func (a *Agent) followNamespace(s desired.Allocation, m *allocState, wanted desired.Plan, now time.Time) api.State {
	request := s.Record.Request
	replaced := (s.Cached || s.Live) && m.place.Left(s.NetNS, *s.Record)
	unnamed := s.Cached && len(request.Addresses) == 0 && len(s.Addresses) > 0
	if !replaced && !unnamed {
		if host.Inode(s.Record.NetNS) == 0 && now.Sub(a.pruned) > tick {
			a.pruned = time.Time{} // it died
		}
		a.note(s.Key, m, "namespace", nil)
		return api.StateManaged
	}
	addresses, err := discover.There(s.NetNS, s.Addresses)
	a.note(s.Key, m, "namespace", err)
	if err != nil || !replaced && len(addresses) == 0 {
		return api.StateManaged
	}
	request.Addresses = addresses
	if request.Mode != workload.ModeTransparent && s.Cached {
		request.Network, request.Job = s.Network, s.Job
	}
	m.fresh = true
	if replaced {
		return a.add(s, m, redirect.Attachment{Request: request, MeshConfig: cmp.Or(wanted.MeshConfig, &s.Record.MeshConfig)}, "namespace was replaced: taken over")
	}
	return a.add(s, m, redirect.Attachment{Request: request}, "its addresses are known now")
}

func (a *Agent) add(s desired.Allocation, m *allocState, attachment redirect.Attachment, why string) api.State {
	attachment.Key, attachment.NetNS = s.Key, s.NetNS
	err := a.datapath.Add(attachment)
	a.progressed()
	return a.added(s, m, attachment, why, err)
}

// added takes in what came of an attempt to put an attachment under Weir.
func (a *Agent) added(s desired.Allocation, m *allocState, attachment redirect.Attachment, why string, err error) api.State {
	a.note(s.Key, m, "add", err)
	switch {
	case err == nil:
		m.missing = time.Time{}
		if attachment.MeshConfig != nil {
			a.settle(m, true)
		}
		a.count(func(c *api.Counts) { c.Added++ })
		a.log.Info("workload added", "alloc_id", s.Key.ContainerID, "interface", s.Key.IfName, "namespace", s.Job.Namespace, "job", s.Job.ID, "task_group", s.Job.Group, "mode", string(attachment.Request.Mode), "why", why)
		a.allocationArrived() // what Consul has of it is the next pass's
		return api.StateManaged
	case errors.Is(err, host.ErrConsulRules):
		return api.StateConsul
	}
	return api.StateUnprotected
}
