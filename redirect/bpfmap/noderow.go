// SPDX-License-Identifier: MPL-2.0

package bpfmap

import (
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Lease asks the programs for events for that long; 0 ends it.
func (m *Tables) Lease(length time.Duration) error {
	var row BpfControl
	if _, err := m.Get("control", uint32(0), &row); err != nil {
		return err
	}
	row.EventsUntilNs = 0
	if length > 0 {
		row.EventsUntilNs = MonotonicNow() + uint64(length)
	}
	return m.Put("control", uint32(0), row, ebpf.UpdateAny)
}

// SetDigest says which objects the programs of the node are from.
func (m *Tables) SetDigest(digest [2]uint64) error {
	var row BpfControl
	if _, err := m.Get("control", uint32(0), &row); err != nil {
		return err
	}
	row.Digest = digest
	return m.Put("control", uint32(0), row, ebpf.UpdateAny)
}

// MonotonicNow is the clock of the programs' time stamps.
func MonotonicNow() uint64 {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return 0
	}
	return uint64(now.Nano())
}
