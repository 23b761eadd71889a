// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"time"

	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/discover"
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
	list := append(discover.Problems(a.discoveryError, docker, a.unreadable), consul.ProblemsOf(a.config.Consul.Address)...)
	if a.networkProblem != "" {
		list = append(list, health.NewProblem(health.ProblemNetworkWatch,
			"give the agent CAP_NET_BROADCAST, as its systemd unit does",
			"an address or route that changes after ADD is found within minutes, not at once: "+a.networkProblem))
	}
	return append(list, a.foreign...)
}
