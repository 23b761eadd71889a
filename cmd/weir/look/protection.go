// SPDX-License-Identifier: MPL-2.0

package look

import (
	"slices"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/workload"
)

// protection answers whether a connection from outside can reach a task of a workload past its proxy.
type protection struct {
	answer string // yes, audit or no
	by     string // what protects it
	why    string // it is not yes, where no problem of the workload says so
}

func (w seenWorkload) named() base.Named {
	return base.Named{ID: base.AllocID(w.ID, w.Key), Job: w.Job, Group: w.Group}
}

func (w seenWorkload) protection() protection {
	if w.outside {
		return unmanaged(w.Agent.State)
	}
	transparent := w.Mode == workload.ModeTransparent
	by := "guard"
	if transparent {
		by = "redirect"
	}
	switch {
	case len(w.Problems) > 0: // and they say what
		return protection{answer: "no", by: by}
	case transparent || w.Guard == workload.GuardEnforce:
		return protection{answer: "yes", by: by}
	case w.Guard == workload.GuardAudit:
		return protection{answer: "audit", by: by, why: "connections past the proxy are let in, and 'weir guard' lists them; guard \"enforce\" refuses them"}
	}
	return protection{answer: "no", by: "-", why: "the guard is off: connections past the proxy are let in"}
}

// unmanaged is the answer for what the agent sees and Weir does not redirect.
func unmanaged(state api.State) protection {
	switch state {
	case api.StateConsul:
		return protection{answer: "no", by: "consul", why: "Consul's own rules redirect it, without a guard; the allocation that Nomad starts in its place is under Weir"}
	case api.StateHost:
		return protection{answer: "no", by: "host", why: "it is on the node's own network, where there is nothing to redirect or guard"}
	case api.StateEnded:
		return protection{answer: "-", by: "-"}
	}
	return protection{answer: "no", by: "-"} // its problems say why
}

// proxy tells whether the workload's proxy is there. One that need not be known for anything to be
// redirected, and is not, may be there all the same.
func (w seenWorkload) proxy() string {
	switch {
	case w.outside:
		return "-"
	case w.Proxy.Listeners > 0:
		return "up"
	case w.Mode == workload.ModeTransparent:
		return "down"
	}
	return "-"
}

// consul says how the kernel stands to what Consul has registered.
func (w seenWorkload) consul() string {
	switch {
	case w.Agent == nil:
		return "-"
	case len(w.Agent.Proxies) == 0:
		return "absent"
	case w.Agent.State != api.StateManaged:
		return "-"
	case w.Agent.InSync:
		return "in sync"
	}
	return "behind"
}

// problems are those that the data path and the agent see, each once.
func (w seenWorkload) problems() []health.Problem {
	list := slices.Clone(w.Problems)
	if w.Agent == nil {
		return list
	}
	for _, problem := range w.Agent.Problems {
		same := func(p health.Problem) bool { return p.What == problem.What }
		if !slices.ContainsFunc(list, same) {
			list = append(list, problem)
		}
	}
	return list
}
