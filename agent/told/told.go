// SPDX-License-Identifier: MPL-2.0

// Package told logs each change of what the agent learns from others once, however often it
// looks.
package told

import (
	"log/slog"

	"github.com/weirmesh/weir/agent/catalog"
)

// Once logs what is another thing than the last time.
type Once struct {
	log *slog.Logger

	outOfSync    bool            // with Consul
	hidden       bool            // Consul shows not all services
	watchFailing bool            // of Consul
	unreadable   map[string]bool // files and registrations
}

// NewOnce has told nothing yet.
func NewOnce(log *slog.Logger) *Once { return &Once{log: log} }

// Consul logs when the agent falls out of sync with Consul and when it is
// back.
func (o *Once) Consul(consul catalog.Snapshot) {
	if !o.outOfSync && !consul.InSync && consul.Error.What != "" {
		o.outOfSync = true
		o.log.Warn("Consul does not answer: the last known state stays", "error", consul.Error.What)
	}
	if o.outOfSync && consul.InSync {
		o.outOfSync = false
		o.log.Info("Consul answers again")
	}
	if failing := consul.Watch.What != ""; failing != o.watchFailing {
		o.watchFailing = failing
		if failing {
			o.log.Warn("the Consul watch is failing: it is read at short intervals", "error", consul.Watch.What)
		} else {
			o.log.Info("the Consul watch works again")
		}
	}
	if consul.Hidden != o.hidden {
		o.hidden = consul.Hidden
		if consul.Hidden {
			o.log.Warn("Consul hides services of this node: the token needs service_prefix \"\" { policy = \"read\" }")
		} else {
			o.log.Info("Consul shows all services of this node")
		}
	}
}

// Unreadable logs what cannot be read, files, registrations or Docker, once.
func (o *Once) Unreadable(problems []string) {
	now := make(map[string]bool)
	for _, problem := range problems {
		now[problem] = true
		if !o.unreadable[problem] {
			o.log.Warn("cannot be read", "why", problem)
		}
	}
	o.unreadable = now
}
