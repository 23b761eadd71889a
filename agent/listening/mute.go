// SPDX-License-Identifier: MPL-2.0

package listening

import (
	"fmt"
	"slices"
	"strings"

	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
)

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
	noun := "port"
	if len(missing) > 1 {
		noun = "ports"
	}
	what := fmt.Sprintf("its proxy does not listen on %s %s", noun, strings.Join(missing, " and "))
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
