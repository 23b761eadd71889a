// SPDX-License-Identifier: MPL-2.0

package catalog

import (
	"fmt"

	"github.com/weirmesh/weir/redirect/health"
)

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
