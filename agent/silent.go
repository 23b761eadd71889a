// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"maps"
	"slices"
	"time"

	"github.com/weirmesh/weir/agent/listening"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
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
		if !listening.OneIsSilent(seen[m.hook]) {
			m.proxies.Heard()
			delete(due, key)
		} else if len(m.proxies.Registered) > 0 {
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
		if len(seen[m.hook]) == len(m.proxies.Registered) { // else the kernel does not know of all of them yet
			a.setProxies(key, m, m.proxies.Among(cgroups[m.view.NetNS], m.view.ID, known), seen[m.hook])
		}
	}
	for _, m := range due {
		wait = min(wait, m.proxies.Sought(now, cost))
	}
	return wait
}

// dueForSearch are those whose proxies do not listen and are to be looked for now, and when
// the next of the others is. started says that a task began since the last time.
func (a *Agent) dueForSearch(started bool, now time.Time) (due map[workload.AttachmentID]*allocState, wait time.Duration) {
	due, wait = make(map[workload.AttachmentID]*allocState), tick
	for key, m := range a.allocations {
		next, silent := m.proxies.Due(started, now)
		if !silent || m.hook == 0 || m.view.Mode == workload.ModeDirect || m.view.Mode == workload.ModeGateway {
			continue // in those nothing is redirected from which the UID exempts
		}
		if next > 0 {
			wait = min(wait, next)
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
