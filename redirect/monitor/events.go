// SPDX-License-Identifier: MPL-2.0

// Package monitor reads the ring of events: one for each connection, with what was
// decided about it.
package monitor

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"github.com/cilium/ebpf/ringbuf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// ErrBusy: somebody else reads the events; the ring has one reader.
var ErrBusy = errors.New("events have another reader")

// EventLease is how far ahead a reader asks for events. Programs stop by
// themselves when a reader died without a word.
const EventLease = 5 * time.Second

// eventPause is how long events gather in the ring where they come one by one.
const eventPause = 50 * time.Millisecond

// Event is one connection and what was decided about it.
type Event struct {
	Time        time.Time      `json:"time"`
	Cookie      uint64         `json:"cookie,string"` // of the workload
	Verdict     bpfmap.Verdict `json:"-"`
	Name        string         `json:"verdict"`
	Source      netip.AddrPort `json:"source,omitzero"` // inbound: who dialled
	Origin      netip.AddrPort `json:"origin"`          // what was dialled; of a listener, where it is
	Destination netip.AddrPort `json:"destination"`     // where the verdict sent it
	UID         uint32         `json:"uid"`             // of the dialler, or of who binds; 0 inbound, as are the next three
	PID         uint32         `json:"pid"`
	Cgroup      uint64         `json:"cgroup"`
	Command     string         `json:"command"`
	Transport   string         `json:"transport,omitempty"` // of the egress guard: the protocol, or what kind of socket was made
	Lost        uint64         `json:"lost,omitempty"`      // with EventsLost: how many, since the last such event
}

// Read delivers every connection of every workload from now on, until ctx
// ends, which is no error, or deliver returns one. One reader at a time:
// ErrBusy otherwise. A workload has its share of the ring, which no other takes
// from it; what a reader is too slow for is lost, and an event with the verdict
// EventsLost says so, per workload, at most a second later and at the end.
func Read(ctx context.Context, paths store.Paths, deliver func(Event) error) (err error) {
	lock, err := os.OpenFile(paths.EventsLock(), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("open lock: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return ErrBusy
	} else if err != nil {
		return fmt.Errorf("take lock %s: %w", paths.EventsLock(), err)
	}
	tables, err := bpfmap.OpenTables(paths.Maps())
	if err != nil {
		return err
	}
	defer tables.Close()
	ring, err := tables.Table("events")
	if err != nil {
		return err
	}
	reader, err := ringbuf.NewReader(ring)
	if err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	defer reader.Close()
	defer func() { err = errors.Join(err, tables.Lease(0)) }()
	since := bpfmap.MonotonicNow() // what a former reader left in the ring is older
	lost := lostEvents{told: make(map[uint64]uint64)}
	if _, err := lost.count(tables); err != nil { // ... and so is what it lost
		return err
	}
	delivered := 0
	resolved := func(event Event) error {
		delivered++
		return deliver(WithOrigin(tables, event))
	}
	// The reader does not know of ctx.
	defer context.AfterFunc(ctx, func() { _ = reader.Flush() })() // it was closed meanwhile
	for before := 0; ctx.Err() == nil; {
		if err := tables.Lease(EventLease); err != nil {
			return err
		}
		now, leased := delivered, time.Now()
		if err := drain(ctx, reader, since, resolved); err != nil {
			return err
		}
		// A workload has an event let through many times a second, so where none came
		// for two turns none is lost, unless the lease ran out: a calm node's counters
		// are not all read.
		if delivered == before && time.Since(leased) < EventLease {
			continue
		}
		before = now
		if err := lost.tell(tables, deliver); err != nil {
			return err
		}
	}
	if err := tables.Lease(0); err != nil {
		return err
	}
	if err := lost.rest(reader, since, resolved); err != nil {
		return err
	}
	return lost.tell(tables, deliver)
}

// drain delivers events that are not older than since until a fifth of the
// lease has passed.
func drain(ctx context.Context, reader *ringbuf.Reader, since uint64, deliver func(Event) error) error {
	deadline := time.Now().Add(EventLease / 5)
	var record ringbuf.Record
	for time.Now().Before(deadline) && ctx.Err() == nil {
		reader.SetDeadline(deadline)
		err := reader.ReadInto(&record)
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, ringbuf.ErrFlushed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read events: %w", err)
		}
		row, err := decodeRecord(record)
		if err != nil {
			return err
		}
		if row.TimeNs < since {
			continue
		}
		if err := deliver(decodeEvent(row)); err != nil {
			return err
		}
		if reader.AvailableBytes() > 0 {
			continue
		}
		// The kernel wakes the reader for an event that finds the ring empty, at the
		// cost of who connects. So the next ones find one in it.
		select {
		case <-ctx.Done():
		case <-time.After(eventPause):
		}
	}
	return nil
}

func decodeRecord(record ringbuf.Record) (row bpfmap.BpfEvent, err error) {
	if _, err := binary.Decode(record.RawSample, binary.NativeEndian, &row); err != nil {
		return row, fmt.Errorf("decode event: %w", err)
	}
	return row, nil
}

// WithOrigin puts the origin in the place of an encoded address, where the
// program that reported left it to the reader.
func WithOrigin(t *bpfmap.Tables, event Event) Event {
	switch event.Verdict { //nolint:exhaustive // of a connection that waited for the proxy, or of its packets
	case bpfmap.Redirected, bpfmap.RefusedNoProxy, bpfmap.ListenerGone, bpfmap.Held:
	default:
		return event
	}
	if index, encoded := workload.DecodeIndex(event.Origin.Addr()); encoded {
		var addr bpfmap.BpfAddr
		if found, err := t.Get("indexes", bpfmap.BpfIndexKey{Cookie: event.Cookie, Index: index}, &addr); err == nil && found {
			event.Origin = bpfmap.DecodeAddrPort(addr, event.Origin.Port())
		}
	}
	return event
}

func decodeEvent(row bpfmap.BpfEvent) Event {
	event := Event{
		Time:        time.Now().Add(-time.Duration(bpfmap.MonotonicNow() - row.TimeNs)),
		Cookie:      row.Cookie,
		Verdict:     bpfmap.Verdict(row.Verdict),
		Name:        bpfmap.Verdict(row.Verdict).String(),
		Origin:      bpfmap.DecodeAddrPort(row.Origin, row.OriginPort),
		Destination: bpfmap.DecodeAddrPort(row.Destination, row.DestinationPort),
		UID:         row.Uid,
		PID:         row.Pid,
		Cgroup:      row.Cgroup,
		Command:     unix.ByteSliceToString((*[len(row.Comm)]byte)(unsafe.Pointer(&row.Comm))[:]),
	}
	switch event.Verdict { //nolint:exhaustive // of the others the reader need not know it
	case bpfmap.EgressAudited, bpfmap.EgressSocketAudited, bpfmap.RefusedEgress, bpfmap.RefusedEgressSocket:
		event.Transport = TransportOf(row.Family, row.SocketType, row.Protocol)
	}
	if row.SourcePort != 0 {
		event.Source = bpfmap.DecodeAddrPort(row.Source, row.SourcePort)
		event.Origin = event.Destination
	}
	return event
}
