// SPDX-License-Identifier: MPL-2.0

package listening

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/host"
)

// candidate is who the kernel takes for a proxy of a workload.
type candidate struct {
	task  string    // "": no task of Nomad's can be told from its cgroup
	tries int       // in which it was not told to be the proxy or not to be
	next  time.Time // when to look again; zero: it is known
}

// firstDoubt is when a candidate that cannot be told is looked at again; it
// doubles each time.
const firstDoubt = 5 * time.Second

// Cgroups are those in which the kernel saw the proxies, each once.
func Cgroups(proxies []redirect.ObservedProxy) (cgroups []uint64) {
	for _, proxy := range proxies {
		if proxy.Cgroup != 0 && !slices.Contains(cgroups, proxy.Cgroup) {
			cgroups = append(cgroups, proxy.Cgroup)
		}
	}
	return cgroups
}

// Doubtful keeps of the candidates those in the cgroups, and tells which are to be looked at.
func (p *Proxies) Doubtful(cgroups []uint64, now time.Time) (list []uint64) {
	maps.DeleteFunc(p.candidates, func(cgroup uint64, _ candidate) bool { return !slices.Contains(cgroups, cgroup) })
	for _, cgroup := range cgroups {
		if known, seen := p.candidates[cgroup]; !seen || !known.next.IsZero() && now.After(known.next) {
			list = append(list, cgroup)
		}
	}
	return list
}

// Learn takes in which task a candidate is, and reports whether it is none that Nomad
// injected for the proxies. task is empty where that cannot be told.
func (p *Proxies) Learn(cgroup uint64, task string, now time.Time) (other bool) {
	found := candidate{task: task}
	if task == "" || !registration.Injected(task, p.Registered) {
		found.tries = p.candidates[cgroup].tries + 1
		found.next = now.Add(firstDoubt << min(found.tries, 10))
	}
	if p.candidates == nil {
		p.candidates = make(map[uint64]candidate)
	}
	p.candidates[cgroup] = found
	return task != "" && !found.next.IsZero()
}

// Tries is how often a candidate could not be told to be a proxy.
func (p *Proxies) Tries(cgroup uint64) int { return p.candidates[cgroup].tries }

// Reject notes that a candidate was none, and says so.
func (p *Proxies) Reject(cgroup uint64) string {
	p.rejected = fmt.Sprintf("task %q listened under the proxy's UID and was taken for the proxy: its listeners were taken out", p.candidates[cgroup].task)
	delete(p.candidates, cgroup)
	return p.rejected
}

// Problems are the last candidate that was none, and, of a workload under Weir, proxies that
// do not listen.
func (p *Proxies) Problems(managed bool) (problems []health.Problem) {
	if p.rejected != "" {
		problems = append(problems, health.NewProblem(health.ProblemTaskAsProxy, "give that task a user of its own in the job", p.rejected))
	}
	if mute := p.Mute(); managed && mute.What != "" {
		problems = append(problems, mute)
	}
	return problems
}

// Tasks names those that the kernel took for proxies.
func (p *Proxies) Tasks() string {
	var names []string
	for _, c := range p.candidates {
		if c.task != "" {
			names = append(names, c.task)
		}
	}
	slices.Sort(names)
	return strings.Join(slices.Compact(names), ", ")
}

// RunIn reports whether a task that Nomad injected for the proxy, for each
// where there are several, runs in the workload's namespace.
func (p *Proxies) RunIn(netns, allocID string, known discover.Containers) bool {
	cgroups, err := host.CgroupsIn(netns)
	if err != nil {
		return false
	}
	missing := func(one registration.Proxy) bool {
		return !slices.ContainsFunc(cgroups[netns], func(path string) bool {
			return registration.Injected(discover.TaskOf(path, allocID, known), []registration.Proxy{one})
		})
	}
	return len(p.Registered) > 0 && !slices.ContainsFunc(p.Registered, missing)
}
