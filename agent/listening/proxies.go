// SPDX-License-Identifier: MPL-2.0

// Package listening remembers whether the proxies of an allocation listen, and whom the
// kernel took for them.
package listening

import (
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
)

// How long a proxy may take until it listens before that is a problem, and how
// often the sockets in its place are looked at from then on.
const (
	ProxyStart = 10 * time.Second
	interval   = 30 * time.Second
)

// How often the task of a proxy that does not listen is looked for: at first
// often, and never so often that it costs more than a part of a core.
const (
	FirstSearch = 100 * time.Millisecond
	lastSearch  = 2 * time.Second
	searchShare = 20 // of the time that a search takes, until the next one
)

// Proxies are those of one allocation.
type Proxies struct {
	Registered []registration.Proxy // as Consul had them in the last pass

	since    time.Time      // since when one of them does not listen; zero: all do
	sought   time.Time      // when its task is looked for next
	listened bool           // all of them did at some time
	mute     health.Problem // that one does not listen; none where they do, or may still start
	heard    time.Time      // when that was last looked at

	candidates map[uint64]candidate // whom the kernel took for them when that was last looked at, by cgroup
	rejected   string               // what was said of the last one that was none
}

// Renew forgets whether they listen: the allocation has another namespace from now on.
func (p *Proxies) Renew(now time.Time) {
	p.since, p.sought, p.listened, p.mute, p.heard = now, time.Time{}, false, health.Problem{}, time.Time{}
}

// AllListen reports whether there are any, and all of them do as far as is known.
func (p *Proxies) AllListen() bool { return p.since.IsZero() && len(p.Registered) > 0 }

// Mute is the problem that one does not listen; without text there is none.
func (p *Proxies) Mute() health.Problem { return p.mute }

// Observe takes in what the kernel knows of their listeners, and reports whether to look
// for what listens in the place of one that does not.
func (p *Proxies) Observe(seen []redirect.ObservedProxy, now time.Time) (look bool) {
	switch {
	case len(seen) == 0: // its rows are not there yet
	case !OneIsSilent(seen):
		p.listened, p.since, p.mute, p.heard = true, time.Time{}, health.Problem{}, time.Time{}
	case p.since.IsZero():
		p.since = now
	case len(p.Registered) == 0 && p.listened:
		p.mute = health.Problem{} // it ends
	case now.Sub(p.since) > ProxyStart && now.Sub(p.heard) > interval:
		p.heard = now
		return true
	}
	return false
}

// Found takes in what listens in their place.
func (p *Proxies) Found(ports inspect.ProxyPorts, rejected []inspect.RejectedListener) {
	p.mute = muteProblem(ports, rejected)
}

// OneIsSilent reports whether the kernel knows no listener of one of them.
func OneIsSilent(seen []redirect.ObservedProxy) bool {
	return slices.ContainsFunc(seen, func(s redirect.ObservedProxy) bool { return !s.Listens })
}

// Due is how long until the task of one that does not listen is to be looked for; silent is
// false where all listen. started says that a task began since the last time.
func (p *Proxies) Due(started bool, now time.Time) (wait time.Duration, silent bool) {
	if p.since.IsZero() {
		return 0, false
	}
	if started {
		return 0, true
	}
	return max(p.sought.Sub(now), 0), true
}

// Heard notes that all of them listen.
func (p *Proxies) Heard() { p.since = time.Time{} }

// Sought notes that a task was looked for, what that took, and says when to look again.
func (p *Proxies) Sought(now time.Time, cost time.Duration) time.Duration {
	pause := max(min(max(now.Sub(p.since)/16, FirstSearch), lastSearch), cost*searchShare)
	p.sought = now.Add(pause)
	return pause
}

// Among tells their cgroups by the names of the tasks of an allocation: by service,
// those for which there is one cgroup and no other.
func (p *Proxies) Among(paths []string, allocID string, known discover.Containers) map[string]uint64 {
	tasks := make(map[string][]string)
	for _, path := range paths {
		if of, ok := nearest(discover.TaskOf(path, allocID, known), p.Registered); ok {
			tasks[of.OwnService().Name] = append(tasks[of.OwnService().Name], path)
		}
	}
	found := make(map[string]uint64)
	for service, paths := range tasks {
		if len(paths) > 1 {
			continue
		}
		if id, err := host.CgroupID(paths[0]); err == nil { // else it ended
			found[service] = id
		}
	}
	return found
}

// nearest is the proxy that Nomad injected the task for: where the name of one
// service begins with another's, the longer one's.
func nearest(task string, proxies []registration.Proxy) (found registration.Proxy, ok bool) {
	for _, p := range proxies {
		if registration.Injected(task, []registration.Proxy{p}) && (!ok || strings.HasPrefix(p.Task(), found.Task())) {
			found, ok = p, true
		}
	}
	return found, ok
}
