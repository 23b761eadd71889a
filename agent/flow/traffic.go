// SPDX-License-Identifier: MPL-2.0

package flow

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/prometheus/procfs"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/bpfmap"
)

// edgeKey tells edges apart as the ring has them.
type edgeKey struct {
	cookie         uint64
	peer           *Workload
	task, service  string
	source, origin [16]byte
	port           uint16
	verdict        bpfmap.Verdict
}

func (k edgeKey) workload() uint64 { return k.cookie }

type edgeCount struct {
	record *Record // one of them
	count  uint64
}

// TrafficRecords is how many records are gone through for one answer, the newest.
const TrafficRecords = 200_000

// Traffic counts the connections since a moment by their ends.
func (f *Recorder) Traffic(since time.Time) api.Traffic {
	t := api.Traffic{Schema: 1, Since: since, Until: time.Now(), Edges: []api.CountedEdge{}}
	edges := newShareTable[edgeKey, edgeCount]()
	number, _ := f.Ring.Since(since)
	if end := f.Ring.end(); end-min(number, end) > TrafficRecords {
		number, t.Since = end-TrafficRecords, time.Time{}
	}
	for {
		records, missed, changed := f.Ring.Read(number)
		if changed != nil {
			break
		}
		number += missed + uint64(len(records))
		for i := range records {
			r := &records[i]
			if !within(&t, time.Unix(0, r.At)) {
				continue
			}
			if r.Verdict == bpfmap.EventsLost {
				t.Lost += uint64(r.Lost)
				continue
			}
			if !r.Verdict.IsConnection() || r.Verdict == bpfmap.Held { // its connection is counted already
				continue
			}
			if counted := edges.entry(r.edge(), edgeCount{record: r}); counted != nil {
				counted.count++
			}
		}
	}
	t.Omitted = edges.omitted
	counts := make(map[api.Edge]uint64, len(edges.Entries))
	for _, counted := range edges.Entries {
		counts[f.flow(counted.record).Edge()] += counted.count
	}
	t.Edges = append(t.Edges, byCount(counts)...)
	t.Problem = f.Trouble()
	return t
}

// within reports whether a record is of the time that the answer is of, which begins with the
// first record where it has no beginning.
func within(t *api.Traffic, at time.Time) bool {
	if t.Since.IsZero() {
		t.Since = at
	}
	return !at.Before(t.Since) && !at.After(t.Until)
}

// edge is what the record's connection is counted under.
func (r *Record) edge() edgeKey {
	key := edgeKey{
		cookie: r.Workload.Cookie, peer: r.peer, task: r.Task, service: r.service, origin: r.Origin, port: r.OriginPort, verdict: r.Verdict,
	}
	if api.DirectionOf(r.Verdict) != api.DirectionOutbound {
		key.source = r.Source
	}
	return key
}

// byCount lists the edges, those with the most connections first.
func byCount(counts map[api.Edge]uint64) (edges []api.CountedEdge) {
	for edge, count := range counts {
		edges = append(edges, api.CountedEdge{Edge: edge, Count: count})
	}
	slices.SortFunc(edges, func(a, b api.CountedEdge) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Source.AllocID, b.Source.AllocID), a.Destination.IP.Compare(b.Destination.IP),
			cmp.Compare(a.Destination.Port, b.Destination.Port), cmp.Compare(a.Verdict, b.Verdict))
	})
	return edges
}

// OwnProcess is what this process has used.
func OwnProcess() (api.Process, error) {
	self, err := procfs.NewProc(os.Getpid())
	if err != nil {
		return api.Process{}, fmt.Errorf("read own process: %w", err)
	}
	stat, err := self.Stat()
	if err != nil {
		return api.Process{}, fmt.Errorf("read own process: %w", err)
	}
	return api.Process{PID: stat.PID, CPU: stat.CPUTime(), Memory: uint64(max(0, stat.ResidentMemory()))}, nil
}
