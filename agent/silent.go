// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
)

// How often the task of a proxy that does not listen is looked for: at first
// often, and never so often that it costs more than a part of a core.
const (
	firstSearch = 100 * time.Millisecond
	searchShare = 20 // of the time that a search takes, until the next one
)

// identifyProxies tells the kernel who the proxies are that do not listen, by the
// names of their tasks: until one listens, all under its UID would be taken for
// it. It returns when to look again.
func (a *Agent) identifyProxies(now time.Time) time.Duration {
	known := a.containers()
	started := !maps.Equal(known.Tasks, a.tasks)
	a.tasks = known.Tasks
	due, wait := a.dueForSearch(started, now)
	if len(due) == 0 {
		return wait
	}
	var cookies []uint64
	for _, m := range due {
		cookies = append(cookies, m.hook)
	}
	seen, err := a.datapath.ObservedProxies(cookies)
	if err != nil {
		return tick // the data path is on its way back
	}
	var namespaces []string
	for key, m := range due {
		if !slices.ContainsFunc(seen[m.hook], func(s redirect.ObservedProxy) bool { return !s.Listens }) {
			m.notListeningSince = time.Time{}
			delete(due, key)
		} else if len(m.proxies) > 0 {
			namespaces = append(namespaces, m.view.NetNS)
		}
	}
	if len(due) == 0 {
		return wait
	}
	var cgroups map[string][]string
	var cost time.Duration
	if len(namespaces) > 0 {
		began := time.Now()
		if cgroups, err = host.CgroupsIn(namespaces...); err != nil {
			a.warnOnce("look for the tasks of proxies", err)
		}
		cost = time.Since(began)
	}
	for key, m := range due {
		if len(seen[m.hook]) == len(m.proxies) { // else the kernel does not know of all of them yet
			a.setProxies(key, m, m.proxiesAmong(cgroups[m.view.NetNS], known), seen[m.hook])
		}
	}
	for _, m := range due {
		pause := max(min(max(now.Sub(m.notListeningSince)/16, firstSearch), tick), cost*searchShare)
		m.sought = now.Add(pause)
		wait = min(wait, pause)
	}
	return wait
}

// dueForSearch are those whose proxies do not listen and are to be looked for now, and when
// the next of the others is. started says that a task began since the last time.
func (a *Agent) dueForSearch(started bool, now time.Time) (due map[workload.AttachmentID]*allocState, wait time.Duration) {
	due, wait = make(map[workload.AttachmentID]*allocState), tick
	for key, m := range a.allocations {
		if m.notListeningSince.IsZero() || m.hook == 0 || m.view.Mode == workload.ModeDirect || m.view.Mode == workload.ModeGateway {
			continue // in those nothing is redirected from which the UID exempts
		}
		if !started && now.Before(m.sought) {
			wait = min(wait, m.sought.Sub(now))
			continue
		}
		due[key] = m
	}
	return due, wait
}

// setProxies tells the kernel the cgroups of proxies, by service, that it does not have yet.
func (a *Agent) setProxies(key workload.AttachmentID, m *allocState, cgroups map[string]uint64, seen []redirect.ObservedProxy) {
	for service, cgroup := range cgroups {
		if slices.ContainsFunc(seen, func(s redirect.ObservedProxy) bool { return s.Cgroup == cgroup }) {
			continue
		}
		err := a.datapath.SetProxyCgroup(key, service, cgroup)
		if ends(err) {
			err = nil // it went meanwhile
		}
		a.note(key, m, "recognise", err)
	}
}

// proxiesAmong tells the proxies' cgroups by the names of the tasks: by service,
// those for which there is one cgroup and no other.
func (m *allocState) proxiesAmong(paths []string, known discover.Containers) map[string]uint64 {
	tasks := make(map[string][]string)
	for _, path := range paths {
		if of, ok := nearest(discover.TaskOf(path, m.view.ID, known), m.proxies); ok {
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
