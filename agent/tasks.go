// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"errors"
	"io/fs"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/listening"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
)

// verifyProxyTask compares whom the kernel took for the workload's proxy with the task
// that it should be. The kernel takes the first that listens under the proxy's
// UID. Another task is ruled out only where the proxy's own is seen to run
// beside it: a job may name the proxy's task as it likes.
func (a *Agent) verifyProxyTask(key workload.AttachmentID, m *allocState, cgroup uint64, now time.Time) {
	path, err := host.CgroupPath(cgroup)
	if errors.Is(err, fs.ErrNotExist) {
		return // it ended; the next one is learned
	}
	a.note(key, m, "proxy", err)
	if err != nil {
		return
	}
	known := a.containers()
	task := discover.TaskOf(path, m.view.ID, known)
	before := m.proxies.Tasks()
	if m.proxies.Learn(cgroup, task, now) && m.proxies.RunIn(m.view.NetNS, m.view.ID, known) {
		err := a.datapath.RejectProxyCgroup(key, cgroup)
		a.note(key, m, "proxy", err)
		if err == nil {
			a.count(func(c *api.Counts) { c.Repaired++ })
			a.changes.Workload(m.view, api.ChangeRepaired, m.proxies.Reject(cgroup), now)
			a.log.Warn("workload's proxy learned anew", "alloc_id", key.ContainerID, "interface", key.IfName, "task", task, "cgroup", path)
			a.trigger()
			return
		}
	}
	if m.proxies.Tasks() != before {
		a.trigger() // it is shown
	}
}

// lookSome looks at a part of the workloads under Weir, which costs little:
// whether somebody detached their lookup program, and who their proxy is.
func (a *Agent) lookSome(now time.Time) {
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
	for key, m := range turn {
		if !a.datapath.LookupAttached(m.hook) {
			a.check(key)
		}
		a.checkListens(key, m, seen[m.hook], now)
		for _, cgroup := range m.proxies.Doubtful(listening.Cgroups(seen[m.hook]), now) {
			a.verifyProxyTask(key, m, cgroup, now)
		}
	}
}
