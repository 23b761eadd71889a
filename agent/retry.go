// SPDX-License-Identifier: MPL-2.0

package agent

import "time"

// note remembers how a step went, tells when that changes, and sees to another
// try.
func (a *Agent) note(m *memory, step string, err error) {
	if m == nil {
		return
	}
	text := errorText(err)
	if text != m.errors[step] {
		if err != nil {
			a.log.Warn("workload "+step+" failed", "error", err)
		}
		if m.errors == nil {
			m.errors = make(map[string]string)
		}
		if m.errors[step] = text; text == "" {
			delete(m.errors, step)
		}
	}
	if err != nil {
		m.failures++
		m.retry = time.Now().Add(tempo{failures: m.failures}.pause(0.5))
		a.count(func(c *Counts) { c.Failures++ })
	} else if len(m.errors) == 0 {
		m.failures, m.retry = 0, time.Time{}
	}
}

func (a *Agent) retryDue(now time.Time) bool {
	for _, m := range a.subjects {
		if !m.retry.IsZero() && now.After(m.retry) {
			return true
		}
	}
	return false
}
