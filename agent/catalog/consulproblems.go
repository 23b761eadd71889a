// SPDX-License-Identifier: MPL-2.0

package catalog

import (
	"errors"
	"fmt"
	"net/http"

	"github.com/hashicorp/consul/api"
	"github.com/weirmesh/weir/redirect/health"
)

// ConsulProblem is an answer that Consul did not give, and what to do; nothing
// where there is no error.
func ConsulProblem(err error) health.Problem {
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

// ProblemsOf are what is wrong with the node's view of Consul.
func (v Snapshot) ProblemsOf(address string) (list []health.Problem) {
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
