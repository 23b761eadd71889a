// SPDX-License-Identifier: MPL-2.0

package flow

import (
	"net/netip"
	"sync"
	"time"
	"unsafe"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/monitor"
)

// Record is one event as the ring keeps it: as small as may be, because an
// hour of a busy node has hundreds of thousands. It is never changed.
type Record struct {
	At       int64 // Unix time in nanoseconds
	cgroup   uint64
	Workload *Workload // whose event it is
	peer     *Workload // the other end, where it is a workload of this node; nil: it is not, or not known
	Task     string    // of the source
	service  string    // of the destination
	Command  [16]byte

	Transport string // see redirect.Event

	Source, Origin, destination             [16]byte
	SourcePort, OriginPort, destinationPort uint16
	Valid                                   [3]bool // source, origin, destination

	Uid, Pid, Lost uint32
	Verdict        bpfmap.Verdict
}

const RecordSize = int(unsafe.Sizeof(Record{}))

// Workload is what the flows of one workload have in common.
type Workload struct {
	Cookie                         uint64
	AllocID, namespace, Job, Group string
	service                        string // where it has one and no other
}

func PackAddr(addr netip.AddrPort) (bytes [16]byte, port uint16, valid bool) {
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
func (r *Record) event() monitor.Event {
	event := monitor.Event{
		Time: time.Unix(0, r.At), Cookie: r.Workload.Cookie, Verdict: r.Verdict, Name: r.Verdict.String(),
		Source:      unpackAddr(r.Source, r.SourcePort, r.Valid[0]),
		Origin:      unpackAddr(r.Origin, r.OriginPort, r.Valid[1]),
		Destination: unpackAddr(r.destination, r.destinationPort, r.Valid[2]),
		UID:         r.Uid, PID: r.Pid, Cgroup: r.cgroup, Command: r.commandName(), Lost: uint64(r.Lost),
		Transport: r.Transport,
	}
	return event
}

func (r *Record) commandName() string {
	for i, b := range r.Command {
		if b == 0 {
			return string(r.Command[:i])
		}
	}
	return string(r.Command[:])
}

// flowRing keeps the newest records, as many as fit into its memory and none
// older than its history. Readers take what they have not read by its number and
// copy nothing: a chunk is only ever appended to. So there may be any number of
// them, and a slow one costs the others nothing.
type flowRing struct {
	ChunkLen int
	Most     int // chunks
	history  time.Duration

	mu      sync.Mutex
	Chunks  [][]Record
	first   uint64        // number of the oldest record that is kept
	next    uint64        // ... of the next one to come
	dropped uint64        // records that gave way to newer ones though they were not older than history
	until   int64         // ... the newest of them
	changed chan struct{} // closed at the next record; nil: nobody waits
}

// NewRing makes a ring of so many bytes, which it takes as it fills.
func NewRing(bytes int, history time.Duration) *flowRing {
	const chunks = 64 // a ring gives up a chunk at a time
	length := max(bytes/RecordSize/chunks, 1)
	return &flowRing{ChunkLen: length, Most: max(bytes/RecordSize/length, 2), history: history}
}

func (r *flowRing) Append(record Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	last := len(r.Chunks) - 1
	if last < 0 || len(r.Chunks[last]) == r.ChunkLen {
		r.expire(time.Unix(0, record.At))
		if len(r.Chunks) == r.Most {
			r.dropped += uint64(len(r.Chunks[0]))
			r.until = r.Chunks[0][len(r.Chunks[0])-1].At
			r.drop()
		}
		r.Chunks = append(r.Chunks, make([]Record, 0, r.ChunkLen))
		last = len(r.Chunks) - 1
	}
	r.Chunks[last] = append(r.Chunks[last], record)
	r.next++
	if r.changed != nil {
		close(r.changed)
		r.changed = nil
	}
}

// drop gives up the oldest chunk.
func (r *flowRing) drop() {
	r.first += uint64(len(r.Chunks[0]))
	r.Chunks[0] = nil
	r.Chunks = r.Chunks[1:]
}

// expire gives up the chunks that are older than the history.
func (r *flowRing) expire(now time.Time) {
	limit := now.Add(-r.history).UnixNano()
	for len(r.Chunks) > 0 && r.Chunks[0][len(r.Chunks[0])-1].At < limit {
		r.drop()
	}
}

// Tidy is expire for who does not hold the lock.
func (r *flowRing) Tidy(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.expire(now)
}

// Read returns records from number on, as many as lie together; how many before
// them the reader missed; and where there are none, what is closed once there
// are some. The records must not be written to.
func (r *flowRing) Read(number uint64) (records []Record, missed uint64, changed <-chan struct{}) {
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
	chunk, offset := int(number-r.first)/r.ChunkLen, int(number-r.first)%r.ChunkLen
	records = r.Chunks[chunk][offset:]
	return records[:len(records):len(records)], missed, nil
}

// end is the number of the next record to come.
func (r *flowRing) end() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.next
}

// Since is the number of the first record that is not older than at, and how many
// that were not have been given up for want of memory.
func (r *flowRing) Since(at time.Time) (number, dropped uint64) {
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
	for _, chunk := range r.Chunks {
		if chunk[len(chunk)-1].At >= limit {
			break
		}
		number += uint64(len(chunk))
	}
	return number, dropped
}

// Last is the number of the record from which on so many match.
func (r *flowRing) Last(count int, from uint64, match func(*Record) bool) uint64 {
	r.mu.Lock()
	chunks, number := append([][]Record(nil), r.Chunks...), r.next
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
