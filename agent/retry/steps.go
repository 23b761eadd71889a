// SPDX-License-Identifier: MPL-2.0

// Package retry remembers which steps went wrong for an allocation, and when to try again.
package retry

import (
	"maps"
	"slices"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/wait"
	"github.com/weirmesh/weir/redirect/health"
)

// Steps are those of one allocation. None went wrong at first.
type Steps struct {
	errors   map[string]string // by step
	failures int
	retry    time.Time // when to try again; zero: nothing went wrong
}

// Note takes in how a step went, and reports whether that is another thing than before.
// After an error there is another try, later with each.
func (s *Steps) Note(step string, err error, now time.Time) (changed bool) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if changed = text != s.errors[step]; changed {
		s.set(step, text)
	}
	if err != nil {
		s.failures++
		s.retry = now.Add(wait.PollInterval{Failures: s.failures}.Pause(0.5))
	} else if len(s.errors) == 0 {
		s.failures, s.retry = 0, time.Time{}
	}
	return changed
}

func (s *Steps) set(step, text string) {
	if s.errors == nil {
		s.errors = make(map[string]string)
	}
	if s.errors[step] = text; text == "" {
		delete(s.errors, step)
	}
}

// Await has one step alone wait until a moment, which is no failure of it.
func (s *Steps) Await(step string, why error, until time.Time) {
	s.errors, s.retry = map[string]string{step: why.Error()}, until
}

// Clear forgets what went wrong.
func (s *Steps) Clear() { s.errors, s.retry = nil, time.Time{} }

// Failures is how often a step went wrong since all of them went well.
func (s *Steps) Failures() int { return s.failures }

// Well reports whether nothing is to be tried again.
func (s *Steps) Well() bool { return s.retry.IsZero() }

// Due reports whether it is time for another try.
func (s *Steps) Due(now time.Time) bool { return !s.retry.IsZero() && now.After(s.retry) }

// Problems are what is wrong, by step.
func (s *Steps) Problems() (list []health.Problem) {
	for _, step := range slices.Sorted(maps.Keys(s.errors)) {
		list = append(list, api.StepProblem(step, s.errors[step]))
	}
	return list
}
