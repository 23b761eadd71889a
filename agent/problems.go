// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"time"

	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/listening"
	"github.com/weirmesh/weir/redirect/health"
)

// noteProblems tells the list of changes what is wrong now.
func (a *Agent) noteProblems(now time.Time) {
	consul, docker := a.consulNow(), a.containers().Error
	a.mu.Lock()
	node, workloads := a.nodeProblems(consul, docker), a.status.Workloads
	if a.status.DataPath != "" {
		node = append(node, a.status.RepairProblem())
	}
	a.mu.Unlock()
	a.changes.Problems(node, workloads, now, now.Sub(a.status.Started) > 2*listening.ProxyStart)
}

// nodeProblems are what is wrong with what the agent learns from others. The
// caller holds the mutex.
func (a *Agent) nodeProblems(consul catalog.Snapshot, docker string) []health.Problem {
	var list []health.Problem
	if a.discoveryError != "" {
		list = append(list, health.NewProblem(health.ProblemDiscovery, "see whether the agent can read cni { cache_dir } and its records in state_dir; until then nothing new is found or changed", a.discoveryError))
	}
	list = append(list, consul.ProblemsOf(a.config.Consul.Address)...)
	if docker != "" {
		list = append(list, health.NewProblem(health.ProblemDocker,
			`see whether Docker runs and answers at docker { socket }; socket = "" where it is not to be asked`,
			"Docker's containers may be other ones by now: "+docker))
	}
	if a.networkProblem != "" {
		list = append(list, health.NewProblem(health.ProblemNetworkWatch,
			"give the agent CAP_NET_BROADCAST, as its systemd unit does",
			"an address or route that changes after ADD is found within minutes, not at once: "+a.networkProblem))
	}
	list = append(list, a.foreign...)
	for _, what := range a.unreadable {
		list = append(list, health.NewProblem(health.ProblemStateUnreadable, "what cannot be read is skipped: remove it, and 'nomad alloc stop' the allocation that it is of", what))
	}
	return list
}
