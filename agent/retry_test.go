// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/weirmesh/weir/redirect/workload"
)

// What goes wrong is found in the log by the allocation's name, once.
func TestFailureNamesItsAllocation(t *testing.T) {
	var log bytes.Buffer
	a := &Agent{log: slog.New(slog.NewTextHandler(&log, nil))}
	m := new(allocState)
	for range 2 {
		a.note(workload.AttachmentID{ContainerID: numbered(1), IfName: "eth0"}, m, "add", errors.New("open namespace: denied"))
	}
	want := `msg="workload add failed" alloc_id=` + numbered(1) + ` interface=eth0 error="open namespace: denied"`
	if strings.Count(log.String(), want) != 1 || strings.Count(log.String(), "\n") != 1 {
		t.Errorf("log = %s, want one line with %s", &log, want)
	}
	if m.steps.Failures() != 2 || m.steps.Well() {
		t.Errorf("%d failures, nothing to try again: %t; want 2 and another try", m.steps.Failures(), m.steps.Well())
	}
}
