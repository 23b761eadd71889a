// SPDX-License-Identifier: MPL-2.0

package retry

import (
	"errors"
	"testing"
	"time"
)

// A step that goes wrong is tried again, until all go well; the same error is no news.
func TestSteps(t *testing.T) {
	var s Steps
	now := time.Unix(1000, 0)
	if !s.Well() || s.Due(now) || len(s.Problems()) > 0 {
		t.Errorf("at first: %+v, want nothing wrong", s)
	}
	denied := errors.New("denied")
	if !s.Note("add", denied, now) || s.Note("add", denied, now) || s.Failures() != 2 || s.Well() {
		t.Errorf("after the same error twice: %+v, want it told once, counted twice, and tried again", s)
	}
	if s.Due(now) || !s.Due(now.Add(time.Hour)) {
		t.Errorf("after an error: %+v, want another try later", s)
	}
	if s.Note("configure", nil, now) || s.Well() {
		t.Errorf("after another step went well: %+v, want the first tried again", s)
	}
	if list := s.Problems(); len(list) != 1 || list[0].What == "" {
		t.Errorf("problems are %+v, want one", list)
	}
	if !s.Note("add", nil, now) || !s.Well() || s.Failures() != 0 || len(s.Problems()) > 0 {
		t.Errorf("after it went well: %+v, want nothing wrong", s)
	}
	s.Await("record", denied, now.Add(time.Minute))
	if s.Failures() != 0 || s.Due(now) || !s.Due(now.Add(2*time.Minute)) || len(s.Problems()) != 1 {
		t.Errorf("while a step waits: %+v, want a problem and no failure", s)
	}
	if s.Clear(); !s.Well() || len(s.Problems()) > 0 {
		t.Errorf("cleared: %+v, want nothing wrong", s)
	}
}
