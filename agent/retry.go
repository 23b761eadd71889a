// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// note remembers how a step went, tells when that changes, and sees to another
// try.
func (a *Agent) note(key workload.AttachmentID, m *allocState, step string, err error) {
	if m == nil {
		return
	}
	level := slog.LevelWarn
	if ends(err) {
		level = slog.LevelDebug
	}
	if m.steps.Note(step, err, time.Now()) && err != nil {
		a.log.Log(context.Background(), level, "workload "+step+" failed", "alloc_id", key.ContainerID, "interface", key.IfName, "error", err)
	}
	if err != nil && level != slog.LevelDebug {
		a.count(func(c *api.Counts) { c.Failures++ })
	}
}

// ends reports whether an error is what a step meets when the allocation ended
// meanwhile: its record or its namespace is gone. The next pass finds the same,
// and there a record that somebody else took away is told, as is an allocation
// that libcni still names.
func ends(err error) bool {
	return errors.Is(err, store.ErrUnknown) || errors.Is(err, host.ErrNetNSGone)
}

func (a *Agent) retryDue(now time.Time) bool {
	for _, m := range a.allocations {
		if m.steps.Due(now) {
			return true
		}
	}
	return false
}
