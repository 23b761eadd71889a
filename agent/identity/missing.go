// SPDX-License-Identifier: MPL-2.0

package identity

import (
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/workload"
)

// registrationGrace is how long a transparent allocation may be without a registration:
// one that is stopped loses it first, and goes on for its shutdown_delay.
const registrationGrace = 5 * time.Minute

// Missing is a problem where Consul has had no registration of a proxy for long,
// though the allocation has one: nothing that changes in Consul reaches it.
func (m *Memory) Missing(s desired.Allocation, state api.State, consul catalog.Snapshot, now time.Time) (list []health.Problem) {
	transparent := s.Record != nil && s.Record.Request.Mode == workload.ModeTransparent
	if state != api.StateManaged || !transparent || !s.Cached || len(s.Proxies) > 0 || len(m.claims) > 0 || !consul.InSync || consul.Hidden {
		m.absent = time.Time{}
		return nil
	}
	if m.absent.IsZero() {
		m.absent = now
	}
	if now.Sub(m.absent) < registrationGrace {
		return nil
	}
	return []health.Problem{health.NewProblem(health.ProblemNotRegistered,
		"see in the log of Nomad's client whether it reaches Consul: it registers the services anew; nothing where the job is being stopped",
		"Consul has had no registration of its proxy for minutes: the last configuration stays, and no change in Consul reaches it")}
}
