// SPDX-License-Identifier: MPL-2.0

package flow

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// guardTable counts what came in past the proxies. A port that is ephemeral counts
// nowhere: under enforce, too, a datagram to one is let in.
type guardTable struct {
	shareTable[guardKey, guardCount]
	began time.Time
	lost  uint64
}

type guardKey struct {
	cookie uint64
	port   uint16
	source netip.Addr
}

func (k guardKey) workload() uint64 { return k.cookie }

type guardCount struct {
	workload    *Workload
	peer        *Workload // the source, where it is a workload of this node
	verdict     bpfmap.Verdict
	count       uint64
	first, last int64 // Unix time in nanoseconds

	letIn, refused int64 // when it was last; 0: never
}

func NewGuardTable(now time.Time) *guardTable {
	return &guardTable{shareTable: newShareTable[guardKey, guardCount](), began: now}
}

// Note takes in a record, which it keeps nothing of but the names.
func (g *guardTable) Note(r *Record) {
	switch r.Verdict { //nolint:exhaustive // nothing else is for the guard
	case bpfmap.GuardAudited, bpfmap.RefusedGuard, bpfmap.EventsLost:
	default:
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if r.Verdict == bpfmap.EventsLost {
		g.lost += uint64(r.Lost)
		return
	}
	key := guardKey{cookie: r.Workload.Cookie, port: r.OriginPort, source: unpackAddr(r.Source, 0, r.Valid[0]).Addr()}
	entry := g.entry(key, guardCount{first: r.At})
	if entry == nil {
		return
	}
	entry.workload, entry.verdict, entry.last = r.Workload, r.Verdict, r.At
	if r.peer != nil {
		entry.peer = r.peer // and it stays so when that allocation ends
	}
	entry.count++
	if r.Verdict == bpfmap.GuardAudited {
		entry.letIn = r.At
	} else {
		entry.refused = r.At
	}
}

// RefusedAgain is what the guard of a workload refused since a moment and had let in
// before: its ports, each with its sources, sorted.
func (g *guardTable) RefusedAgain(of inspect.Record, since time.Time) (list []RefusedPort) {
	sources := make(map[uint16][]string)
	g.mu.Lock()
	for key, e := range g.Entries {
		if key.cookie == of.Cookie && e.letIn != 0 && e.refused > e.letIn && e.refused >= since.UnixNano() {
			sources[key.port] = append(sources[key.port], e.source(key))
		}
	}
	g.mu.Unlock()
	for _, port := range slices.Sorted(maps.Keys(sources)) {
		list = append(list, RefusedPort{
			Port: port, Sources: slices.Compact(slices.Sorted(slices.Values(sources[port]))), Remedy: guardRemedy(of.Request.Mode, port),
		})
	}
	return list
}

// RefusedPort is a port that a guard refuses to who was let in before.
type RefusedPort struct {
	Port    uint16
	Sources []string
	Remedy  string // the line of the job that lets it in
}

// source names who dialled.
func (c *guardCount) source(key guardKey) string {
	if c.peer != nil {
		return c.peer.Label()
	}
	return key.source.String()
}

// RefusedAgain is that of the guard; nothing where flows are not recorded.
func (f *Recorder) RefusedAgain(of inspect.Record, since time.Time) []RefusedPort {
	if f == nil {
		return nil
	}
	return f.guard.RefusedAgain(of, since)
}

// Keep drops what is of workloads that are gone.
func (g *guardTable) Keep(known []inspect.Record, now time.Time) {
	g.forget(known, now, func(entry *guardCount) int64 { return entry.last })
}

// List is the table as it is now, sorted, beside the mode and the namespace of
// each workload as they are known.
func (g *guardTable) List(known []inspect.Record, served func(netns string) (tcp, udp map[uint16]bool, err error)) api.GuardList {
	of := make(map[uint64]inspect.Record, len(known))
	for _, k := range known {
		of[k.Cookie] = k
	}
	g.mu.Lock()
	list := api.GuardList{Schema: 1, Since: g.began, Entries: make([]api.GuardEntry, 0, len(g.Entries)), Omitted: g.omitted, Lost: g.lost}
	cookies := make([]uint64, 0, len(g.Entries))
	for key, e := range g.Entries {
		list.Entries = append(list.Entries, api.GuardEntry{
			AllocID: e.workload.AllocID, Job: e.workload.Job, TaskGroup: e.workload.Group, Port: key.port, Source: e.source(key),
			Verdict: e.verdict.String(), Count: e.count, First: time.Unix(0, e.first), Last: time.Unix(0, e.last),
			Remedy: guardRemedy(of[key.cookie].Request.Mode, key.port),
		})
		cookies = append(cookies, key.cookie)
	}
	g.mu.Unlock()
	type ports struct{ tcp, udp map[uint16]bool }
	seen := make(map[uint64]ports)
	for i, cookie := range cookies {
		if _, ok := seen[cookie]; !ok {
			var p ports
			if k, ok := of[cookie]; ok {
				p.tcp, p.udp, _ = served(k.NetNS) // it ended meanwhile, and its protocols are not known
			}
			seen[cookie] = p
		}
		e, p := &list.Entries[i], seen[cookie]
		switch tcp, udp := p.tcp[e.Port], p.udp[e.Port]; {
		case tcp && !udp:
			e.Protocol = "tcp"
		case udp && !tcp:
			e.Protocol = "udp"
		}
	}
	slices.SortFunc(list.Entries, func(a, b api.GuardEntry) int {
		return cmp.Or(cmp.Compare(a.Job, b.Job), cmp.Compare(a.AllocID, b.AllocID), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Source, b.Source))
	})
	return list
}

// guardRemedy is what lets connections to the port in, as a line of the job. Only a
// transparent job can exclude a port: in another one it is mapped.
func guardRemedy(mode workload.Mode, port uint16) string {
	if mode == workload.ModeTransparent {
		return fmt.Sprintf(`transparent_proxy { exclude_inbound_ports = ["%d"] }`, port)
	}
	return fmt.Sprintf(`network { port "port-%d" { to = %d } }`, port, port)
}

// Label names a workload as commands do.
func (w *Workload) Label() string {
	const short = 8 // as Nomad shortens IDs
	text := w.AllocID
	if len(text) > short {
		text = text[:short]
	}
	if w.Group != "" {
		text = w.Group + "/" + text
	}
	if w.Job != "" {
		text = w.Job + "/" + text
	}
	return text
}
