// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"time"

	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/workload"
)

// checkListens makes a problem of a proxy that does not listen, and says what
// listens in its place.
func (a *Agent) checkListens(key workload.AttachmentID, m *allocState, seen []redirect.ObservedProxy, now time.Time) {
	before := m.proxies.Mute()
	if m.proxies.Observe(seen, now) {
		ports, rejected, err := a.datapath.RejectedListeners(key)
		if ends(err) {
			return // it went meanwhile
		}
		a.note(key, m, "listeners", err)
		m.proxies.Found(ports, rejected)
		if mute := m.proxies.Mute(); mute.What != "" && mute != before {
			a.log.Warn("workload's proxy does not listen", "alloc_id", key.ContainerID, "interface", key.IfName, "problem", mute.What)
		}
	}
	if m.proxies.Mute() != before {
		a.trigger() // it is shown
	}
}
