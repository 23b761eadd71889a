// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// How long a proxy may take until it listens before that is a problem, and how
// often the sockets in its place are looked at from then on.
const (
	proxyStart     = 10 * time.Second
	listenInterval = 30 * time.Second
)

// checkListens makes a problem of a proxy that does not listen, and says what
// listens in its place.
func (a *Agent) checkListens(key workload.AttachmentID, m *allocState, seen []redirect.ObservedProxy, now time.Time) {
	before := m.mute
	switch {
	case len(seen) == 0:
		return // its rows are not there yet
	case !slices.ContainsFunc(seen, func(s redirect.ObservedProxy) bool { return !s.Listens }):
		m.listened, m.notListeningSince, m.mute, m.heard = true, time.Time{}, health.Problem{}, time.Time{}
	case m.notListeningSince.IsZero():
		m.notListeningSince = now
	case len(m.proxies) == 0 && m.listened:
		m.mute = health.Problem{} // it ends
	case now.Sub(m.notListeningSince) > proxyStart && now.Sub(m.heard) > listenInterval:
		m.heard = now
		ports, rejected, err := a.datapath.RejectedListeners(key)
		if ends(err) {
			return // it went meanwhile
		}
		a.note(key, m, "listeners", err)
		if m.mute = muteProblem(ports, rejected); m.mute.What != "" && m.mute != before {
			a.log.Warn("workload's proxy does not listen", "alloc_id", key.ContainerID, "interface", key.IfName, "problem", m.mute.What)
		}
	}
	if m.mute != before {
		a.trigger() // it is shown
	}
}

// muteProblem says what is wrong with a proxy that does not listen, by what
// listens on its ports; nothing where it has none.
func muteProblem(ports inspect.ProxyPorts, rejected []inspect.RejectedListener) health.Problem {
	if len(ports.Missing) == 0 {
		return health.Problem{}
	}
	var missing []string
	for _, port := range ports.Missing {
		missing = append(missing, fmt.Sprint(port))
	}
	what := fmt.Sprintf("its proxy does not listen on port %s", strings.Join(missing, " and "))
	if len(rejected) == 0 {
		return health.NewProblem(health.ProblemProxyNotListening,
			"see the log of the proxy's task ('nomad alloc logs'): whether Envoy runs, and gets its configuration from Consul", what+": nothing does")
	}
	var sockets []string
	for _, r := range rejected {
		owner := "no process is seen to have it"
		if r.PID != 0 {
			owner = fmt.Sprintf("process %d %q in cgroup %s", r.PID, r.Command, r.Cgroup)
		}
		sockets = append(sockets, fmt.Sprintf("%s is UID %d's (%s)", r.Address, r.UID, owner))
	}
	what = fmt.Sprintf("%s under UID %d: %s", what, ports.UID, strings.Join(sockets, "; "))
	of := func(is func(inspect.RejectedListener) bool) bool { return slices.ContainsFunc(rejected, is) }
	switch {
	case of(func(r inspect.RejectedListener) bool { return r.Usable && r.UID != ports.UID }):
		return health.NewProblem(health.ProblemProxyNotListening, fmt.Sprintf("let Envoy run under UID %d as the node sees it: where Docker remaps users, userns_mode = \"host\" in the sidecar_task's config; where it is a task's socket, give the task another port", ports.UID), what)
	case of(func(r inspect.RejectedListener) bool { return r.Usable }):
		return health.NewProblem(health.ProblemProxyNotListening, "where it is another task's, give that task a user of its own; where it is Envoy's, an MPTCP socket cannot be handed connections, and 'weir verdicts' says what else is wrong", what)
	}
	return health.NewProblem(health.ProblemProxyNotListening, "let Envoy listen on 127.0.0.1 or on all addresses: take bind_address out of the proxy's config", what)
}
