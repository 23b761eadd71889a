// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/prometheus/procfs"
	"github.com/weirmesh/weir/redirect/bpfmap"
)

// edgeKey tells edges apart as the ring has them.
type edgeKey struct {
	cookie         uint64
	peer           *flowWorkload
	task, service  string
	source, origin [16]byte
	port           uint16
	verdict        bpfmap.Verdict
}

func (k edgeKey) workload() uint64 { return k.cookie }

type edgeCount struct {
	record *flowRecord // one of them
	count  uint64
}

// trafficRecords is how many records are gone through for one answer, the newest.
const trafficRecords = 200_000

// traffic counts the connections since a moment by their ends.
func (f *flows) traffic(since time.Time) Traffic {
	t := Traffic{Schema: 1, Since: since, Until: time.Now(), Edges: []CountedEdge{}}
	edges := newShareTable[edgeKey, edgeCount]()
	number, _ := f.ring.since(since)
	if end := f.ring.end(); end-min(number, end) > trafficRecords {
		number, t.Since = end-trafficRecords, time.Time{}
	}
	for {
		records, missed, changed := f.ring.read(number)
		if changed != nil {
			break
		}
		number += missed + uint64(len(records))
		for i := range records {
			r := &records[i]
			at := time.Unix(0, r.at)
			switch {
			case t.Since.IsZero():
				t.Since = at
			case at.Before(t.Since) || at.After(t.Until):
				continue
			}
			if r.verdict == bpfmap.EventsLost {
				t.Lost += uint64(r.lost)
				continue
			}
			if !IsConnection(r.verdict) || r.verdict == bpfmap.Held { // its connection is counted already
				continue
			}
			key := edgeKey{
				cookie: r.workload.cookie, peer: r.peer, task: r.task, service: r.service, origin: r.origin, port: r.originPort, verdict: r.verdict,
			}
			if DirectionOf(r.verdict) != DirectionOutbound {
				key.source = r.source
			}
			if counted := edges.entry(key, edgeCount{record: r}); counted != nil {
				counted.count++
			}
		}
	}
	t.Omitted = edges.omitted
	counts := make(map[Edge]uint64, len(edges.entries))
	for _, counted := range edges.entries {
		counts[counted.record.flow(f.node).Edge()] += counted.count
	}
	for edge, count := range counts {
		t.Edges = append(t.Edges, CountedEdge{Edge: edge, Count: count})
	}
	slices.SortFunc(t.Edges, func(a, b CountedEdge) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Source.AllocID, b.Source.AllocID), a.Destination.IP.Compare(b.Destination.IP),
			cmp.Compare(a.Destination.Port, b.Destination.Port), cmp.Compare(a.Verdict, b.Verdict))
	})
	f.mu.Lock()
	t.Problem = f.problem
	f.mu.Unlock()
	return t
}

// ownProcess is what this process has used.
func ownProcess() (Process, error) {
	self, err := procfs.NewProc(os.Getpid())
	if err != nil {
		return Process{}, fmt.Errorf("read own process: %w", err)
	}
	stat, err := self.Stat()
	if err != nil {
		return Process{}, fmt.Errorf("read own process: %w", err)
	}
	return Process{PID: stat.PID, CPU: stat.CPUTime(), Memory: uint64(max(0, stat.ResidentMemory()))}, nil
}
