// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/weirmesh/weir/redirect/health"
)

// settleTime is how long an allocation may be on its way, in or out, before what
// is not in order about it counts as wrong: a registration comes and goes beside
// its namespace, and a record beside libcni's result.
const settleTime = recordGrace

// consulProblem is an answer that Consul did not give, and what to do; nothing
// where there is no error.
func consulProblem(err error) health.Problem {
	if err == nil {
		return health.Problem{}
	}
	code := health.ProblemConsulUnreachable
	remedy := "see whether Consul's agent runs and whether consul { address } of the configuration is where it listens"
	var status api.StatusError
	switch {
	case errors.As(err, &status) && status.Code == http.StatusForbidden:
		code = health.ProblemConsulForbidden
		remedy = `give the agent a token with node "NODE" { policy = "read" }, agent "NODE" { policy = "read" } and service_prefix "" { policy = "read" }, where NODE is the name of its Consul node`
	case errors.As(err, &status) && status.Code == http.StatusTooManyRequests:
		remedy = "raise Consul's limits.http_max_conns_per_client or its request limits"
	case errors.As(err, &status) && status.Code == http.StatusNotFound:
		remedy = "write the configuration entry, or stop what asks for it"
	case errors.As(err, &status) && status.Code >= http.StatusInternalServerError:
		remedy = "see the log of Consul's agent, and whether its servers have a leader"
	}
	return health.NewProblem(code, remedy, err.Error())
}

// problems are what is wrong with the node's view of Consul.
func (v snapshot) problems(address string) (list []health.Problem) {
	none := health.Problem{}
	if v.Error != none { // what else is said is of the last good answer
		problem := v.Error
		problem.What = fmt.Sprintf("not in sync with Consul at %s: %s", address, v.Error.What)
		problem.Remedy += "; until then the last known state stays"
		return []health.Problem{problem}
	}
	if v.Hidden {
		list = append(list, health.NewProblem(health.ProblemConsulHidden,
			`give the agent's token service_prefix "" { policy = "read" }`,
			fmt.Sprintf("Consul at %s hides services of this node from the token: their allocations may not be guarded", address)))
	}
	if v.Watch != none {
		list = append(list, health.NewProblem(health.ProblemConsulWatch,
			v.Watch.Remedy+"; where a blocking query cannot be had, consul { watch = false }",
			fmt.Sprintf("the Consul watch is failing, Consul is read every 7 to 23 seconds instead: %s", v.Watch.What)))
	} else if v.Bind != none {
		list = append(list, health.NewProblem(health.ProblemConsulFamily,
			v.Bind.Remedy,
			fmt.Sprintf("whether proxies listen on IPv4 or IPv6 is not known, IPv4 is assumed: %s", v.Bind.What)))
	}
	if why := v.Facts.NoNames; why != none {
		list = append(list, health.NewProblem(health.ProblemConsulNames,
			why.Remedy,
			fmt.Sprintf("a virtual IP that Consul gives to another service is noticed within minutes, not at once: %s", why.What)))
	}
	for _, what := range v.Problems {
		list = append(list, health.NewProblem(health.ProblemRegistration, "correct that registration in Consul, or deregister it", what))
	}
	return list
}

// nodeProblems are what is wrong with what the agent learns from others. The
// caller holds the mutex.
func (a *Agent) nodeProblems(consul snapshot, docker string) []health.Problem {
	var list []health.Problem
	if a.discoveryError != "" {
		list = append(list, health.NewProblem(health.ProblemDiscovery, "see whether the agent can read cni { cache_dir } and its records in state_dir; until then nothing new is found or changed", a.discoveryError))
	}
	list = append(list, consul.problems(a.config.Consul.Address)...)
	if docker != "" {
		list = append(list, health.NewProblem(health.ProblemDocker,
			`see whether Docker runs and answers at docker { socket }; socket = "" where it is not to be asked`,
			"Docker's containers may be other ones by now: "+docker))
	}
	if a.networks.problem != "" {
		list = append(list, health.NewProblem(health.ProblemNetworkWatch,
			"give the agent CAP_NET_BROADCAST, as its systemd unit does",
			"an address or route that changes after ADD is found within minutes, not at once: "+a.networks.problem))
	}
	list = append(list, a.foreign...)
	for _, what := range a.unreadable {
		list = append(list, health.NewProblem(health.ProblemStateUnreadable, "what cannot be read is skipped: remove it, and 'nomad alloc stop' the allocation that it is of", what))
	}
	return list
}

// problems are what is wrong on the node as the agent sees it. What many
// allocations have in common is said once.
func (s Status) problems(now time.Time) []health.Problem {
	var list []health.Problem
	if since := now.Sub(s.Alive); since > stuck {
		list = append(list, health.NewProblem(health.ProblemAgentStalled,
			"see the agent's log; 'systemctl restart weir-agent' changes nothing for any allocation",
			fmt.Sprintf("the agent's reconcile loop has stalled for %s", since.Round(time.Second))))
	}
	if s.DataPath != "" {
		list = append(list, health.NewProblem(health.ProblemRepairFailed, "see the agent's log, and run 'weir load'", "the agent cannot repair the data path: "+s.DataPath))
	}
	var order []health.Problem
	who := make(map[health.Problem][]WorkloadView)
	for _, w := range s.Workloads {
		if w.State != StateManaged && w.State != StateUnprotected || now.Sub(w.Since) < settleTime {
			continue
		}
		for _, problem := range w.Problems {
			problem = problem.Of("", "")
			if len(who[problem]) == 0 {
				order = append(order, problem)
			}
			who[problem] = append(who[problem], w)
		}
	}
	for _, problem := range order {
		list = append(list, problem.Of(subjectsOf(who[problem])))
	}
	return slices.Clip(list)
}

// name is the allocation with its job, as an operator knows it.
func (w WorkloadView) name() string {
	if w.Job == "" {
		return w.ID
	}
	return fmt.Sprintf("%s (%s/%s)", w.ID, w.Job, w.Group)
}

// subjectsOf names allocations that have a problem in common, few of many, and
// the ID of one that is alone.
func subjectsOf(list []WorkloadView) (allocation, id string) {
	const most = 3
	if len(list) == 1 {
		return "allocation " + list[0].name(), list[0].ID
	}
	var names []string
	for _, w := range list {
		names = append(names, w.name())
	}
	switch {
	case len(names) <= most:
		return fmt.Sprintf("%d allocations, %s", len(names), strings.Join(names, ", ")), ""
	}
	return fmt.Sprintf("%d allocations, among them %s", len(names), strings.Join(names[:most], ", ")), ""
}

// stepProblem is what to do about a step that the agent tries again.
func stepProblem(step, what string) health.Problem {
	code, remedy := health.ProblemStepFailed, "the agent tries again; where it stays, 'nomad alloc stop' the allocation"
	switch step {
	case "record":
		code = health.ProblemRecordMissing
		remedy = "restart Nomad's client, whose CHECK makes the record anew, or 'nomad alloc stop' the allocation"
	case "namespace":
		remedy = "'nomad alloc stop' the allocation where it still runs"
	case "add":
		code = health.ProblemUnprotected
		remedy = "the agent tries again; see its log and 'weir status' for the data path"
	case "configure":
		remedy = "the agent tries again; until then the last known state stays"
	}
	return health.NewProblem(code, remedy, what)
}
