// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"errors"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/redirect"
)

// memory is what the loop remembers of an attachment.
type memory struct {
	view      WorkloadView
	born      time.Time           // when it was first seen
	cached    bool                // libcni knew it in the last pass
	ended     time.Time           // when libcni forgot it; zero: it did not
	fresh     bool                // this pass made its record, and the next one reads it
	inode     uint64              // of its namespace when last seen to be the one of cookie; 0: not seen
	cookie    uint64              // ... on record
	hook      uint64              // cookie of the namespace whose lookup program should be in force; 0: none
	looked    time.Time           // for Consul's own rules
	claimants map[uint64]claimant // whom the kernel took for its proxies when that was last looked at, by cgroup
	stranger  string              // what was said of the last one that was none
	proxies   []proxy             // as Consul had them in the last pass
	claims    map[string]claim    // registrations that name it, by ID
	taskNames []string            // of what runs in it, as far as they can be told; as of the last look
	listens   []uint16            // where sockets under the proxy's UID listen; nil: not looked
	running   time.Time           // since when its tasks are seen to run
	lookAgain time.Time           // for its tasks
	looks     int                 // that were made for the registrations that there are
	silent    time.Time           // since when one of them does not listen; zero: all do
	sought    time.Time           // when its task is looked for next
	listened  bool                // all of them did at some time
	mute      redirect.Problem    // that one does not listen; none where they do, or may still start
	heard     time.Time           // when that was last looked at
	missing   time.Time           // since when its record is missing; zero: it is not
	retry     time.Time           // when to try again what went wrong; zero: nothing did
	failures  int
	errors    map[string]string // by step
}

// recordGrace is how long a record may be missing before it counts as lost:
// at DEL, libcni forgets an allocation after the plugin has.
const recordGrace = 10 * time.Second

var errRecordMissing = errors.New("its record is missing: it ends, or somebody removed the record")

// reconcile compares everything with everything and applies what differs.
func (a *Agent) reconcile(now time.Time) {
	a.arrived.Store(false)
	cached, unreadable, err := a.cache.read()
	if err != nil {
		a.blind("discover allocations", err)
		return
	}
	known, err := a.datapath.Known()
	noRecords := err
	if err != nil && !errors.Is(err, redirect.ErrUnreadable) {
		a.blind("read records", err) // all of them would look like lost ones
		return
	}
	if err != nil {
		unreadable = append(unreadable, err.Error())
	}
	consul := a.consulNow()
	a.flows.learn(known, consul)
	if a.follower != nil {
		a.tellConsul(consul)
	}
	spaces, err := findNamespaces(a.config.CNI.NetNSDir, a.containers())
	if err != nil {
		unreadable = append(unreadable, err.Error())
	}
	a.mu.Lock()
	a.discoveryError, a.unreadable, a.unseen.records = "", unreadable, redirect.UnreadableRecords(noRecords)
	a.mu.Unlock()
	skipped := slices.Concat(unreadable, consul.Problems)
	if problem := a.containers().Error; problem != "" {
		skipped = append(skipped, problem)
	}
	a.tellUnreadable(skipped)
	subjects := gather(cached, known, spaces, consul)
	a.watcher.more = directoriesOf(subjects)
	a.identify(subjects, consul.Facts, now)
	a.byUrgency(subjects)
	a.turn.begin(time.Now())
	for _, s := range subjects {
		a.settle(s, consul, now)
	}
	a.forget(subjects, now)
	a.followNetworks(known)
	if a.turn.left > 0 {
		a.hurry()
	}
	a.awaitRegistration(subjects, now)
	a.publish(a.strays(subjects, consul, now))
}

// blind tells that nothing can be said of the node's allocations.
func (a *Agent) blind(what string, err error) {
	a.trouble(what, err)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.discoveryError = err.Error()
}

// containers is what Docker knows.
func (a *Agent) containers() containers {
	if a.docker == nil {
		return containers{}
	}
	return a.docker.current()
}

// settle brings one attachment to what is wished for it. What goes wrong
// concerns it alone and is tried again.
func (a *Agent) settle(s subject, consul view, now time.Time) {
	m := a.subjects[s.Key]
	if m == nil {
		m = &memory{born: now, view: WorkloadView{Since: now}}
		a.subjects[s.Key] = m
	}
	m.fresh = false
	wanted := desire(s, consul.Facts, policy{Guard: redirect.Guard(a.config.Guard.Default), Forward: a.config.Guard.Forward, ProxyUID: a.config.Proxy.DefaultUID})
	state := a.place(s, m, wanted, now)
	inForce := !m.fresh
	if state == StateManaged && wanted.Overlay != nil && !m.fresh {
		inForce = a.apply(s, m, *wanted.Overlay)
	}
	problems := slices.Clone(wanted.Problems)
	for _, step := range slices.Sorted(maps.Keys(m.errors)) {
		problems = append(problems, stepProblem(step, m.errors[step]))
	}
	if s.Live && !s.Cached && state == StateManaged && len(s.Proxies) > 0 {
		problems = append(problems, redirect.NewProblem(redirect.ProblemResultMissing,
			"'nomad alloc stop' it: the one in its place has a result", "libcni has no result of it: the ports that its job maps are not known"))
	}
	if state == StateEnded {
		problems = []redirect.Problem{leftBehind()}
	}
	if m.stranger != "" {
		problems = append(problems, redirect.NewProblem(redirect.ProblemTaskAsProxy, "give that task a user of its own in the job", m.stranger))
	}
	if m.mute.What != "" && state == StateManaged {
		problems = append(problems, m.mute)
	}
	next := describe(s, state, wanted, problems, consul.Facts)
	next.InStep = state == StateManaged && len(s.Proxies) > 0 && consul.InStep && m.retry.IsZero() && inForce
	next.Task, m.proxies = m.tasks(), s.Proxies
	next.Since = m.view.Since
	if next.InStep != m.view.InStep || next.State != m.view.State {
		next.Since = now
	}
	if next.State != m.view.State && next.State != StateOutside {
		a.log.Info("workload "+string(next.State), "workload", s.Key.String(), "job", s.Job.ID, "group", s.Job.Group, "problems", problems)
	}
	before := m.hook
	m.view, m.hook = next, 0
	if state == StateManaged && s.Known != nil {
		m.hook = s.Known.Cookie
	}
	if m.hook != before {
		m.silent, m.sought = now, time.Time{}
		m.listened, m.mute, m.heard = false, redirect.Problem{}, time.Time{}
	}
}

// place sees to it that a mesh allocation is under Weir and under the right
// namespace, and says where it is.
func (a *Agent) place(s subject, m *memory, wanted wish, now time.Time) State {
	switch {
	case s.Known != nil:
		m.missing = time.Time{}
		a.note(m, "record", nil)
		return a.follow(s, m, now)
	case s.over() && (s.asked() || wanted.Add != nil):
		m.errors, m.retry, m.missing = nil, time.Time{}, time.Time{}
		return StateEnded
	case s.asked():
		if m.view.State == StateConsul && now.Sub(m.looked) < resync {
			return StateConsul
		}
		m.looked = now
		foreign, err := redirect.RedirectedByConsul(s.NetNS)
		a.note(m, "namespace", err)
		if err != nil {
			return StateUnprotected
		}
		if foreign {
			return StateConsul
		}
		if m.missing.IsZero() {
			m.missing = now
		}
		if now.Sub(m.missing) < recordGrace {
			m.errors, m.retry = map[string]string{"record": errRecordMissing.Error()}, m.missing.Add(recordGrace)
			if m.view.State != "" {
				return m.view.State // it may be on its way out
			}
			return StateUnprotected
		}
		request, err := lostRequest(s.attachment)
		a.note(m, "record", err)
		if err != nil {
			return StateUnprotected
		}
		m.fresh = true
		return a.add(s, m, *request, "record was lost: made anew")
	case wanted.Add != nil && !s.Cached && now.Sub(m.ended) < recordGrace:
		return m.view.State // it is on its way out
	case wanted.Add != nil:
		return a.add(s, m, *wanted.Add, "found without a plugin")
	}
	return StateOutside
}

// follow keeps a workload on record in step with its namespace: another one
// under the same ID is guarded at once, with the addresses that it has by then.
func (a *Agent) follow(s subject, m *memory, now time.Time) State {
	request := s.Known.Request
	replaced := (s.Cached || s.Live) && a.replaced(s, m)
	unnamed := s.Cached && len(request.Addresses) == 0 && len(s.Addresses) > 0
	if !replaced && !unnamed {
		if inodeOf(s.Known.NetNS) == 0 && now.Sub(a.swept) > tick {
			a.swept = time.Time{} // it died
		}
		a.note(m, "namespace", nil)
		return StateManaged
	}
	addresses, err := there(s.NetNS, s.Addresses)
	a.note(m, "namespace", err)
	if err != nil || !replaced && len(addresses) == 0 {
		return StateManaged
	}
	request.Addresses = addresses
	if request.Mode != redirect.ModeTransparent && s.Cached {
		request.Network, request.Job = s.Network, s.Job
	}
	m.fresh = true
	if replaced {
		return a.add(s, m, request, "namespace was replaced: taken over")
	}
	return a.add(s, m, request, "its addresses are known now")
}

// replaced reports whether the namespace on record is not the one that libcni
// names, and is no more.
// An inode tells that nothing changed since the last look, within limits: the
// kernel gives it to another namespace later.
func (a *Agent) replaced(s subject, m *memory) bool {
	inode := inodeOf(s.NetNS)
	if inode != 0 && inode == m.inode && m.cookie == s.Known.Cookie {
		return false
	}
	cookie, err := redirect.Cookie(s.NetNS)
	if err != nil {
		return false
	}
	if cookie == s.Known.Cookie {
		m.inode, m.cookie = inode, cookie
		return false
	}
	if s.NetNS == s.Known.NetNS {
		return true
	}
	recorded, err := redirect.Cookie(s.Known.NetNS)
	return errors.Is(err, redirect.ErrNetNSGone) || err == nil && recorded != s.Known.Cookie
}

func inodeOf(path string) uint64 {
	var stat unix.Stat_t
	if unix.Stat(path, &stat) != nil {
		return 0
	}
	return stat.Ino
}

func (a *Agent) add(s subject, m *memory, request redirect.Request, why string) State {
	err := a.datapath.Add(redirect.Attachment{Key: s.Key, NetNS: s.NetNS, Request: request})
	a.note(m, "add", err)
	a.progressed()
	switch {
	case err == nil:
		m.missing = time.Time{}
		a.count(func(c *Counts) { c.Added++ })
		a.log.Info("workload added", "workload", s.Key.String(), "job", s.Job.ID, "group", s.Job.Group, "mode", string(request.Mode), "why", why)
		a.arrive() // what Consul has of it is the next pass's
		return StateManaged
	case errors.Is(err, redirect.ErrConsulRules):
		return StateConsul
	}
	return StateUnprotected
}

// forget drops what is gone. An attachment that no plugin of ours will be
// called for at DEL ends when libcni forgets it.
func (a *Agent) forget(subjects []subject, now time.Time) {
	for _, s := range subjects {
		m := a.subjects[s.Key]
		if s.Cached {
			m.cached, m.ended = true, time.Time{}
			continue
		}
		if m.cached && m.ended.IsZero() {
			m.ended = now
		}
		// One that lives on without libcni's file keeps what it has until it dies.
		if !m.cached || s.Known == nil || s.Live {
			continue
		}
		if s.Known.Request.Mode == redirect.ModeTransparent {
			// Its DEL is the plugin's; where there was none, its namespace tells.
			m.cached, a.swept = false, time.Time{}
			continue
		}
		if !a.turn.allows(time.Now(), a.arrived.Load()) {
			continue
		}
		err := a.datapath.Remove(s.Key)
		a.note(m, "remove", err)
		a.progressed()
		if err == nil {
			m.cached = false
			a.count(func(c *Counts) { c.Removed++ })
			a.log.Info("workload removed: its allocation ended", "workload", s.Key.String())
			a.hurry()
		}
	}
	there := make(map[redirect.Key]bool, len(subjects))
	for _, s := range subjects {
		there[s.Key] = true
	}
	maps.DeleteFunc(a.subjects, func(key redirect.Key, _ *memory) bool { return !there[key] })
}
