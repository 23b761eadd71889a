// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// lease asks the programs for events for that long; 0 ends it.
func (t *tables) lease(length time.Duration) error {
	var row bpfControl
	if _, err := t.get("control", uint32(0), &row); err != nil {
		return err
	}
	row.EventsUntilNs = 0
	if length > 0 {
		row.EventsUntilNs = monotonicNow() + uint64(length)
	}
	return t.put("control", uint32(0), row, ebpf.UpdateAny)
}

// setDigest says which objects the programs of the node are from.
func (m *tables) setDigest(digest [2]uint64) error {
	var row bpfControl
	if _, err := m.get("control", uint32(0), &row); err != nil {
		return err
	}
	row.Digest = digest
	return m.put("control", uint32(0), row, ebpf.UpdateAny)
}

// monotonicNow is the clock of the programs' time stamps.
func monotonicNow() uint64 {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return 0
	}
	return uint64(now.Nano())
}
