// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/wait"
)

// networkInterval is how long rules or host ports that somebody flushed may be
// missing. To look costs a few milliseconds.
const networkInterval = 10 * time.Second

// keepNetworks repairs the networks that the plugin built, until ctx ends. It
// runs beside the loop: firewalls may keep it waiting.
func (a *Agent) keepNetworks(ctx context.Context) {
	failing := ""
	for {
		repaired, err := a.repairNetworks(ctx)
		for _, what := range repaired {
			a.log.Warn("network repaired", "what", what)
			a.changes.Note(api.Change{Time: time.Now(), Kind: api.ChangeRepaired, What: "network: " + what})
		}
		a.count(func(c *api.Counts) { c.Repaired += uint64(len(repaired)) })
		if text := errorText(err); text != failing {
			failing = text
			if err != nil {
				a.log.Error("networks cannot be repaired", "error", err)
			} else {
				a.log.Info("networks can be repaired again")
			}
		}
		if _, alive := wait.Pause(ctx, a.networkInterval, nil); !alive {
			return
		}
	}
}
