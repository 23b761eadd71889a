// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"net/netip"
	"sync"
	"time"
	"unsafe"

	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/bpfmap"
)

// flowRecord is one event as the ring keeps it: as small as may be, because an
// hour of a busy node has hundreds of thousands. It is never changed.
type flowRecord struct {
	at       int64 // Unix time in nanoseconds
	cgroup   uint64
	workload *flowWorkload // whose event it is
	peer     *flowWorkload // the other end, where it is a workload of this node; nil: it is not, or not known
	task     string        // of the source
	service  string        // of the destination
	command  [16]byte

	transport string // see redirect.Event

	source, origin, destination             [16]byte
	sourcePort, originPort, destinationPort uint16
	valid                                   [3]bool // source, origin, destination

	uid, pid, lost uint32
	verdict        bpfmap.Verdict
}

const flowRecordSize = int(unsafe.Sizeof(flowRecord{}))

// flowWorkload is what the flows of one workload have in common.
type flowWorkload struct {
	cookie                         uint64
	allocID, namespace, job, group string
	service                        string // where it has one and no other
}

func packAddr(addr netip.AddrPort) (bytes [16]byte, port uint16, valid bool) {
	if !addr.IsValid() {
		return bytes, 0, false
	}
	return addr.Addr().As16(), addr.Port(), true
}

func unpackAddr(bytes [16]byte, port uint16, valid bool) netip.AddrPort {
	if !valid {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(netip.AddrFrom16(bytes).Unmap(), port)
}

// event is what the kernel told.
func (r *flowRecord) event() redirect.Event {
	event := redirect.Event{
		Time: time.Unix(0, r.at), Cookie: r.workload.cookie, Verdict: r.verdict, Name: r.verdict.String(),
		Source:      unpackAddr(r.source, r.sourcePort, r.valid[0]),
		Origin:      unpackAddr(r.origin, r.originPort, r.valid[1]),
		Destination: unpackAddr(r.destination, r.destinationPort, r.valid[2]),
		UID:         r.uid, PID: r.pid, Cgroup: r.cgroup, Command: r.commandName(), Lost: uint64(r.lost),
		Transport: r.transport,
	}
	return event
}

func (r *flowRecord) commandName() string {
	for i, b := range r.command {
		if b == 0 {
			return string(r.command[:i])
		}
	}
	return string(r.command[:])
}

// flowRing keeps the newest records, as many as fit into its memory and none
// older than its history. Readers take what they have not read by its number and
// copy nothing: a chunk is only ever appended to. So there may be any number of
// them, and a slow one costs the others nothing.
type flowRing struct {
	chunkLen int
	most     int // chunks
	history  time.Duration

	mu      sync.Mutex
	chunks  [][]flowRecord
	first   uint64        // number of the oldest record that is kept
	next    uint64        // ... of the next one to come
	dropped uint64        // records that gave way to newer ones though they were not older than history
	until   int64         // ... the newest of them
	changed chan struct{} // closed at the next record; nil: nobody waits
}

// newFlowRing makes a ring of so many bytes, which it takes as it fills.
func newFlowRing(bytes int, history time.Duration) *flowRing {
	const chunks = 64 // a ring gives up a chunk at a time
	length := max(bytes/flowRecordSize/chunks, 1)
	return &flowRing{chunkLen: length, most: max(bytes/flowRecordSize/length, 2), history: history}
}

func (r *flowRing) append(record flowRecord) {
	r.mu.Lock()
	defer r.mu.Unlock()
	last := len(r.chunks) - 1
	if last < 0 || len(r.chunks[last]) == r.chunkLen {
		r.expire(time.Unix(0, record.at))
		if len(r.chunks) == r.most {
			r.dropped += uint64(len(r.chunks[0]))
			r.until = r.chunks[0][len(r.chunks[0])-1].at
			r.drop()
		}
		r.chunks = append(r.chunks, make([]flowRecord, 0, r.chunkLen))
		last = len(r.chunks) - 1
	}
	r.chunks[last] = append(r.chunks[last], record)
	r.next++
	if r.changed != nil {
		close(r.changed)
		r.changed = nil
	}
}

// drop gives up the oldest chunk.
func (r *flowRing) drop() {
	r.first += uint64(len(r.chunks[0]))
	r.chunks[0] = nil
	r.chunks = r.chunks[1:]
}

// expire gives up the chunks that are older than the history.
func (r *flowRing) expire(now time.Time) {
	limit := now.Add(-r.history).UnixNano()
	for len(r.chunks) > 0 && r.chunks[0][len(r.chunks[0])-1].at < limit {
		r.drop()
	}
}

// tidy is expire for who does not hold the lock.
func (r *flowRing) tidy(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.expire(now)
}

// read returns records from number on, as many as lie together; how many before
// them the reader missed; and where there are none, what is closed once there
// are some. The records must not be written to.
func (r *flowRing) read(number uint64) (records []flowRecord, missed uint64, changed <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if number < r.first {
		missed, number = r.first-number, r.first
	}
	if number >= r.next {
		if r.changed == nil {
			r.changed = make(chan struct{})
		}
		return nil, missed, r.changed
	}
	// All chunks but the last are full.
	chunk, offset := int(number-r.first)/r.chunkLen, int(number-r.first)%r.chunkLen
	records = r.chunks[chunk][offset:]
	return records[:len(records):len(records)], missed, nil
}

// end is the number of the next record to come.
func (r *flowRing) end() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.next
}

// since is the number of the first record that is not older than at, and how many
// that were not have been given up for want of memory.
func (r *flowRing) since(at time.Time) (number, dropped uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if oldest := time.Now().Add(-r.history); at.Before(oldest) {
		at = oldest
	}
	limit := at.UnixNano()
	if r.until >= limit {
		dropped = r.dropped
	}
	number = r.first
	for _, chunk := range r.chunks {
		if chunk[len(chunk)-1].at >= limit {
			break
		}
		number += uint64(len(chunk))
	}
	return number, dropped
}

// last is the number of the record from which on so many match.
func (r *flowRing) last(count int, from uint64, match func(*flowRecord) bool) uint64 {
	r.mu.Lock()
	chunks, number := append([][]flowRecord(nil), r.chunks...), r.next
	r.mu.Unlock()
	for i := len(chunks) - 1; i >= 0; i-- {
		for j := len(chunks[i]) - 1; j >= 0; j-- {
			if number == from {
				return number
			}
			number--
			if match(&chunks[i][j]) {
				if count--; count == 0 {
					return number
				}
			}
		}
	}
	return number
}
