// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
)

// egressTable counts what left past the proxies, with the bounds of guardTable.
type egressTable struct {
	shareTable[egressKey, egressCount]
}

type egressKey struct {
	cookie          uint64
	task, transport string
	to              netip.AddrPort
}

func (k egressKey) workload() uint64 { return k.cookie }

type egressCount struct {
	record flowRecord // the last one
	count  uint64
	first  int64
}

func newEgressTable() *egressTable {
	return &egressTable{newShareTable[egressKey, egressCount]()}
}

func (e *egressTable) note(r *flowRecord) {
	switch r.verdict { //nolint:exhaustive // nothing else is for the egress guard
	case bpfmap.EgressAudited, bpfmap.EgressSocketAudited, bpfmap.RefusedEgress, bpfmap.RefusedEgressSocket:
	default:
		return
	}
	key := egressKey{cookie: r.workload.cookie, task: r.task, transport: r.transport}
	if r.verdict == bpfmap.EgressAudited || r.verdict == bpfmap.RefusedEgress {
		key.to = unpackAddr(r.origin, r.originPort, r.valid[1])
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	entry := e.entry(key, egressCount{first: r.at})
	if entry == nil {
		return
	}
	entry.record = *r
	entry.count++
}

// keep drops what is of workloads that are gone.
func (e *egressTable) keep(known []redirect.Record, now time.Time) {
	e.forget(known, now, func(entry *egressCount) int64 { return entry.record.at })
}

// list is the table as it is now, sorted, and how much had no place in it.
func (e *egressTable) list() ([]EgressEntry, uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	list := make([]EgressEntry, 0, len(e.entries))
	for key, entry := range e.entries {
		r := &entry.record
		one := EgressEntry{
			AllocID: r.workload.allocID, Job: r.workload.job, TaskGroup: r.workload.group, Task: key.task, Command: r.commandName(), UID: r.uid,
			Transport: key.transport, Verdict: r.verdict.String(), Count: entry.count, First: time.Unix(0, entry.first), Last: time.Unix(0, r.at),
			Remedy: fmt.Sprintf(`exclude_uids = ["%d"]`, r.uid),
		}
		if key.to.IsValid() {
			one.Port, one.Destination = key.to.Port(), cmp.Or(r.service, key.to.Addr().String())
			if r.peer != nil {
				one.Destination = r.peer.label()
			}
			one.Remedy = fmt.Sprintf(`exclude_outbound_ports = ["%d"]`, key.to.Port())
		}
		list = append(list, one)
	}
	slices.SortFunc(list, func(a, b EgressEntry) int {
		return cmp.Or(strings.Compare(a.Job, b.Job), strings.Compare(a.AllocID, b.AllocID), strings.Compare(a.Task, b.Task),
			strings.Compare(a.Transport, b.Transport), strings.Compare(a.Destination, b.Destination), cmp.Compare(a.Port, b.Port))
	})
	return list, e.omitted
}

// listGuards are the lists of both guards.
func (f *flows) listGuards(known []redirect.Record) GuardList {
	list := f.guard.list(known, host.Served)
	var omitted uint64
	list.Egress, omitted = f.egress.list()
	list.Omitted += omitted
	return list
}
