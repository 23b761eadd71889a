// SPDX-License-Identifier: MPL-2.0

package monitor

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/cilium/ebpf/ringbuf"
	"github.com/weirmesh/weir/redirect/bpfmap"
)

// lostEvents knows which lost events a reader was told of.
type lostEvents struct {
	told   map[uint64]uint64 // by the cookie of the workload, as the programs count
	unread map[uint64]uint64 // in the ring when the reader ended
}

// count returns how many events each workload lost since the last call.
func (l *lostEvents) count(tables *bpfmap.Tables) (map[uint64]uint64, error) {
	lost := l.unread
	if lost == nil {
		lost = make(map[uint64]uint64)
	}
	l.unread = nil
	err := bpfmap.Walk(tables, "verdicts", func(cookie uint64, row bpfmap.BpfVerdictCounts) error {
		told := l.told[cookie]
		if row.EventsLost < told { // the workload was removed and added again
			told = 0
		}
		if row.EventsLost > told {
			lost[cookie] += row.EventsLost - told
		}
		l.told[cookie] = row.EventsLost
		return nil
	})
	return lost, err
}

// tell delivers an event for each workload that lost some.
func (l *lostEvents) tell(tables *bpfmap.Tables, deliver func(Event) error) error {
	lost, err := l.count(tables)
	if err != nil {
		return err
	}
	for _, cookie := range slices.Sorted(maps.Keys(lost)) {
		err := deliver(Event{Time: time.Now(), Cookie: cookie, Verdict: bpfmap.EventsLost, Name: bpfmap.EventsLost.String(), Lost: lost[cookie]})
		if err != nil {
			return err
		}
	}
	return nil
}

// rest delivers what is in the ring after the programs have stopped to write
// events, for as long as a lease: a reader may be slow, but must come to an
// end. What it does not get any more is lost.
func (l *lostEvents) rest(reader *ringbuf.Reader, since uint64, deliver func(Event) error) error {
	bpfmap.WaitForReaders() // of the lease: the programs that saw it have ended
	deadline := time.Now().Add(EventLease)
	l.unread = make(map[uint64]uint64)
	var record ringbuf.Record
	for reader.AvailableBytes() > 0 {
		reader.SetDeadline(time.Now().Add(50 * time.Millisecond))
		err := reader.ReadInto(&record)
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, ringbuf.ErrFlushed) {
			continue // what is left are records that were given up
		}
		if err != nil {
			return fmt.Errorf("read events: %w", err)
		}
		row, err := decodeRecord(record)
		if err != nil {
			return err
		}
		switch {
		case row.TimeNs < since:
		case time.Now().After(deadline):
			l.unread[row.Cookie]++
		default:
			if err := deliver(decodeEvent(row)); err != nil {
				return err
			}
		}
	}
	return nil
}
