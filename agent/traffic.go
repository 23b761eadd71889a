// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"time"

	"github.com/prometheus/procfs"
	"github.com/weirmesh/weir/redirect/bpfmap"
)

// Traffic is who talked to what of late, and what the agent costs the node.
type Traffic struct {
	Schema  int           `json:"schema"`
	Since   time.Time     `json:"since"` // later than asked where there is more than can be gone through
	Until   time.Time     `json:"until"`
	Edges   []CountedEdge `json:"edges"`   // the most frequent first
	Omitted uint64        `json:"omitted"` // connections for which there was no room: their allocation has too many ends
	Lost    uint64        `json:"lost"`    // connections that the kernel could not tell of
	Problem string        `json:"problem"` // why connections are not recorded; empty: they are
	Agent   Process       `json:"agent"`
}

// Edge is who talks to what: what connections of one kind have in common.
type Edge struct {
	Direction   Direction       `json:"direction"`
	Source      FlowSource      `json:"source,omitzero"`
	Destination FlowDestination `json:"destination,omitzero"`
	Verdict     string          `json:"verdict"`
	Refused     bool            `json:"refused"`
}

// CountedEdge is an edge with the number of its connections.
type CountedEdge struct {
	Edge
	Count uint64 `json:"count"`
}

// Process is what a process has used of the node.
type Process struct {
	PID    int     `json:"pid"`
	CPU    float64 `json:"cpu_seconds"` // since it began
	Memory uint64  `json:"memory_bytes"`
}

// Edge leaves out what is of the one connection.
func (f Flow) Edge() Edge {
	s := f.Source
	s.PID, s.UID, s.Command, s.Port = 0, nil, "", 0
	return Edge{Direction: f.Direction, Source: s, Destination: f.Destination, Verdict: f.Verdict, Refused: f.Refused}
}

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
		t.Edges = append(t.Edges, CountedEdge{edge, count})
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

// trafficSince is Traffic; without what is not recorded, where that is so.
func (a *Agent) trafficSince(since time.Time) Traffic {
	if a.flows == nil {
		return Traffic{Schema: 1, Since: since, Until: time.Now(), Edges: []CountedEdge{}, Problem: ErrFlowsOff.Error()}
	}
	return a.flows.traffic(since)
}

// serveTraffic answers with Traffic since the moment that is asked for.
func (a *Agent) serveTraffic(w http.ResponseWriter, r *http.Request) {
	since, err := ParseMoment(r.URL.Query().Get("since"), time.Now())
	if err != nil {
		http.Error(w, "parameter since: "+err.Error(), http.StatusBadRequest)
		return
	}
	traffic := a.trafficSince(since)
	if traffic.Agent, err = ownProcess(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	a.writeJSON(w, http.StatusOK, traffic)
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

// ReadTraffic asks the agent whose state is in stateDir who talked to what since a
// moment.
func ReadTraffic(ctx context.Context, stateDir string, since time.Time) (Traffic, error) {
	response, err := ask(ctx, stateDir, "/v1/traffic?since="+url.QueryEscape(since.Format(time.RFC3339Nano)))
	if err != nil {
		return Traffic{}, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return Traffic{}, fmt.Errorf("ask agent: answer %s", response.Status)
	}
	const limit = 16 << 20 // bytes; an edge has some five hundred
	var traffic Traffic
	if err := json.NewDecoder(&boundedBody{body: response.Body, limit: limit}).Decode(&traffic); err != nil {
		return Traffic{}, fmt.Errorf("ask agent: %w", err)
	}
	return traffic, nil
}
