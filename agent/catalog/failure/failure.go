// SPDX-License-Identifier: MPL-2.0

// Package failure tells of an answer that Consul did not give.
package failure

import (
	"errors"
	"net/http"

	"github.com/hashicorp/consul/api"
	"github.com/weirmesh/weir/redirect/health"
)

// Problem is an answer that Consul did not give, and what to do; nothing
// where there is no error.
func Problem(err error) health.Problem {
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

// Brief keeps what somebody else's server wrote into its error out of the log
// but for its beginning.
func Brief(err error) error {
	var status api.StatusError
	if errors.As(err, &status) {
		const most = 120
		if len(status.Body) > most {
			status.Body = status.Body[:most] + "..."
		}
		return status
	}
	return err
}
