// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
)

// proxyCandidate is who the kernel takes for a proxy of a workload.
type proxyCandidate struct {
	task  string    // "": no task of Nomad's can be told from its cgroup
	tries int       // in which it was not told to be the proxy or not to be
	next  time.Time // when to look again; zero: it is known
}

// firstDoubt is when a candidate that cannot be told is looked at again; it
// doubles each time.
const firstDoubt = 5 * time.Second

// verifyProxyTask compares whom the kernel took for the workload's proxy with the task
// that it should be. The kernel takes the first that listens under the proxy's
// UID. Another task is ruled out only where the proxy's own is seen to run
// beside it: a job may name the proxy's task as it likes.
func (a *Agent) verifyProxyTask(key workload.AttachmentID, m *allocState, cgroup uint64) {
	path, err := host.CgroupPath(cgroup)
	if errors.Is(err, fs.ErrNotExist) {
		return // it ended; the next one is learned
	}
	a.note(key, m, "proxy", err)
	if err != nil {
		return
	}
	found := proxyCandidate{task: discover.TaskOf(path, m.view.ID, a.containers())}
	if found.task == "" || !registration.Injected(found.task, m.proxies) {
		found.tries = m.candidates[cgroup].tries + 1
		found.next = time.Now().Add(firstDoubt << min(found.tries, 10))
	}
	if found.task != "" && !found.next.IsZero() && a.runsBeside(m) {
		err := a.datapath.RejectProxyCgroup(key, cgroup)
		a.note(key, m, "proxy", err)
		if err == nil {
			m.rejected = fmt.Sprintf("task %q listened under the proxy's UID and was taken for the proxy: its listeners were taken out", found.task)
			a.count(func(c *api.Counts) { c.Repaired++ })
			a.changes.Workload(m.view, api.ChangeRepaired, m.rejected, time.Now())
			a.log.Warn("workload's proxy learned anew", "alloc_id", key.ContainerID, "interface", key.IfName, "task", found.task, "cgroup", path)
			delete(m.candidates, cgroup)
			a.trigger()
			return
		}
	}
	if m.candidates == nil {
		m.candidates = make(map[uint64]proxyCandidate)
	}
	before := m.tasks()
	m.candidates[cgroup] = found
	if m.tasks() != before {
		a.trigger() // it is shown
	}
}

// tasks names those that the kernel took for proxies.
func (m *allocState) tasks() string {
	var names []string
	for _, c := range m.candidates {
		if c.task != "" {
			names = append(names, c.task)
		}
	}
	slices.Sort(names)
	return strings.Join(slices.Compact(names), ", ")
}

// runsBeside reports whether a task that Nomad injected for the proxy, for each
// where there are several, runs in the workload's namespace.
func (a *Agent) runsBeside(m *allocState) bool {
	cgroups, err := host.CgroupsIn(m.view.NetNS)
	if err != nil {
		return false
	}
	known := a.containers()
	missing := func(p registration.Proxy) bool {
		return !slices.ContainsFunc(cgroups[m.view.NetNS], func(path string) bool {
			return registration.Injected(discover.TaskOf(path, m.view.ID, known), []registration.Proxy{p})
		})
	}
	return len(m.proxies) > 0 && !slices.ContainsFunc(m.proxies, missing)
}

// cgroupsOf are those in which the kernel saw the proxies, each once.
func cgroupsOf(proxies []redirect.ObservedProxy) (cgroups []uint64) {
	for _, proxy := range proxies {
		if proxy.Cgroup != 0 && !slices.Contains(cgroups, proxy.Cgroup) {
			cgroups = append(cgroups, proxy.Cgroup)
		}
	}
	return cgroups
}

// lookSome looks at a part of the workloads under Weir, which costs little:
// whether somebody detached their lookup program, and who their proxy is.
func (a *Agent) lookSome() {
	var cookies []uint64
	turn := make(map[workload.AttachmentID]*allocState)
	for range min(looksPerTick, len(a.managed)) {
		key := a.managed[a.nextLook%len(a.managed)]
		a.nextLook++
		if m := a.allocations[key]; m != nil && m.hook != 0 {
			turn[key] = m
			cookies = append(cookies, m.hook)
		}
	}
	seen, err := a.datapath.ObservedProxies(cookies)
	if err != nil {
		return // the data path is on its way back
	}
	now := time.Now()
	for key, m := range turn {
		if !a.datapath.LookupAttached(m.hook) {
			a.check(key)
		}
		cgroups := cgroupsOf(seen[m.hook])
		a.checkListens(key, m, seen[m.hook], now)
		maps.DeleteFunc(m.candidates, func(cgroup uint64, _ proxyCandidate) bool { return !slices.Contains(cgroups, cgroup) })
		for _, cgroup := range cgroups {
			known, seen := m.candidates[cgroup]
			if !seen || !known.next.IsZero() && now.After(known.next) {
				a.verifyProxyTask(key, m, cgroup)
			}
		}
	}
}
