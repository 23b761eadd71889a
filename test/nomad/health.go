// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"slices"
	"sync"
	"time"

	"github.com/weirmesh/weir/test/nomad/wire"
)

// Health is what Consul's catalog held against services while it was watched. After a
// restart of Consul, or of tasks, a check may stay critical there although it passes in
// Consul's agent, and then Envoy has nobody to send a request to: see answerPatience.
type Health struct {
	mutex   sync.Mutex
	failing map[string][]span // by service
	ended   chan struct{}
	done    sync.WaitGroup
}

// A span is a time in which each look found a check of a service critical.
type span struct{ from, to time.Time }

// Looks are so far apart, and what they find reaches an Envoy within so long.
const (
	lookInterval = 50 * time.Millisecond
	envoyDelay   = 2 * time.Second
)

// WatchHealth looks at Consul's catalog until the test ends, or [Health.Stop]. While
// Consul does not answer there is nothing to see.
func (n *Node) WatchHealth() *Health {
	h := &Health{failing: make(map[string][]span), ended: make(chan struct{})}
	consul := n.api.consul
	h.done.Go(func() {
		tick := time.NewTicker(lookInterval)
		defer tick.Stop()
		for {
			begun := time.Now()
			if list, err := consul.criticalChecks(); err == nil {
				for _, c := range list {
					h.saw(c.ServiceName, begun, time.Now())
				}
			}
			select {
			case <-tick.C:
			case <-h.ended:
				return
			}
		}
	})
	n.tb.Cleanup(h.Stop)
	return h
}

// saw adds a look that found a service failing.
func (h *Health) saw(service string, begun, ended time.Time) {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	spans := h.failing[service]
	if last := len(spans) - 1; last >= 0 && begun.Sub(spans[last].to) < time.Second {
		spans[last].to = ended
		return
	}
	h.failing[service] = append(spans, span{begun, ended})
}

// Stop ends the watch.
func (h *Health) Stop() {
	h.mutex.Lock()
	select {
	case <-h.ended:
	default:
		close(h.ended)
	}
	h.mutex.Unlock()
	h.done.Wait()
}

// Explains reports whether a request was lost because the catalog had the sidecars of a
// service as failing: Envoy answered, for want of a healthy one, and meanwhile or shortly
// before one was seen to fail.
func (h *Health) Explains(service string, lost wire.Outcome) bool {
	if lost.Status != 503 || lost.Text != "no healthy upstream" {
		return false
	}
	h.mutex.Lock()
	defer h.mutex.Unlock()
	return slices.ContainsFunc(h.failing[service+"-sidecar-proxy"], func(s span) bool {
		return lost.At.After(s.from.Add(-envoyDelay)) && lost.At.Before(s.to.Add(envoyDelay))
	})
}
