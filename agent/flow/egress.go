// SPDX-License-Identifier: MPL-2.0

package flow

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
)

// egressTable counts what left past the proxies, with the bounds of guardTable.
type egressTable struct {
	shareTable[egressKey, egressCount]
	services *virtualServices
}

type egressKey struct {
	cookie          uint64
	task, transport string
	to              netip.AddrPort
}

func (k egressKey) workload() uint64 { return k.cookie }

type egressCount struct {
	record Record // the last one
	count  uint64
	first  int64
}

// noUID is the user of what the kernel itself sends.
const noUID = ^uint32(0)

func NewEgressTable() *egressTable {
	return &egressTable{shareTable: newShareTable[egressKey, egressCount]()}
}

func (e *egressTable) Note(r *Record) {
	switch r.Verdict { //nolint:exhaustive // nothing else is for the egress guard
	case bpfmap.EgressAudited, bpfmap.EgressSocketAudited, bpfmap.RefusedEgress, bpfmap.RefusedEgressSocket:
	default:
		return
	}
	key := egressKey{cookie: r.Workload.Cookie, task: r.Task, transport: r.Transport}
	if r.Verdict == bpfmap.EgressAudited || r.Verdict == bpfmap.RefusedEgress {
		key.to = unpackAddr(r.Origin, r.OriginPort, r.Valid[1])
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	entry := e.entry(key, egressCount{first: r.At})
	if entry == nil {
		return
	}
	entry.record = *r
	entry.count++
}

// Keep drops what is of workloads that are gone.
func (e *egressTable) Keep(known []inspect.Record, now time.Time) {
	e.forget(known, now, func(entry *egressCount) int64 { return entry.record.At })
}

// List is the table as it is now, sorted, and how much had no place in it.
func (e *egressTable) List() ([]api.EgressEntry, uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	list := make([]api.EgressEntry, 0, len(e.Entries))
	for key, entry := range e.Entries {
		r := &entry.record
		one := api.EgressEntry{
			AllocID: r.Workload.AllocID, Job: r.Workload.Job, TaskGroup: r.Workload.Group, Task: key.task, Command: r.commandName(), UID: r.Uid,
			Transport: key.transport, Verdict: r.Verdict.String(), Count: entry.count, First: time.Unix(0, entry.first), Last: time.Unix(0, r.At),
			Remedy: fmt.Sprintf(`exclude_uids = ["%d"]`, r.Uid),
		}
		if key.to.IsValid() {
			one.Port, one.Destination = key.to.Port(), cmp.Or(e.services.of(r), key.to.Addr().String())
			if r.peer != nil {
				one.Destination = r.peer.Label()
			}
			if one.Port != 0 {
				one.Remedy = fmt.Sprintf(`exclude_outbound_ports = ["%d"]`, key.to.Port())
			}
		}
		if r.Uid == noUID {
			one.Remedy = "none: the kernel's own, by a tunnel or to a forged source"
		}
		list = append(list, one)
	}
	slices.SortFunc(list, func(a, b api.EgressEntry) int {
		return cmp.Or(strings.Compare(a.Job, b.Job), strings.Compare(a.AllocID, b.AllocID), strings.Compare(a.Task, b.Task),
			strings.Compare(a.Transport, b.Transport), strings.Compare(a.Destination, b.Destination), cmp.Compare(a.Port, b.Port))
	})
	return list, e.omitted
}

// ListGuards are the lists of both guards.
func (f *Recorder) ListGuards(known []inspect.Record) api.GuardList {
	list := f.guard.List(known, host.Served)
	var omitted uint64
	list.Egress, omitted = f.egress.List()
	list.Omitted += omitted
	return list
}
