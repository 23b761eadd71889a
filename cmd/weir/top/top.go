// SPDX-License-Identifier: MPL-2.0

// Package top makes rates of what the kernel and the agent have counted: what a node's
// allocations do at present, and what Weir costs the node for it.
package top

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/program/runstats"
)

// Sample is what was counted by a moment.
type Sample struct {
	At       time.Time
	Verdicts []inspect.WorkloadVerdicts
	Programs []runstats.RunTime // nil: their time is not counted
	Traffic  api.Traffic        // since the sample before; Agent.PID is 0 where none answers
	Notes    []string           // what is not known, and why
}

// Report is what happened between two samples, as the rate of each second.
type Report struct {
	Schema       int           `json:"schema"`
	Time         time.Time     `json:"time"`
	Seconds      float64       `json:"seconds"`
	Total        Rates         `json:"total"`
	Allocations  []Allocation  `json:"allocations"`  // the busiest first
	Destinations []Destination `json:"destinations"` // the busiest first
	Programs     []Program     `json:"programs"`     // the costliest first; null: the kernel does not count them
	Agent        *Process      `json:"agent"`        // null: none answers
	Notes        []string      `json:"notes"`
}

// Rates are connections a second. One of a proxy to another node is not among them: it
// stands for one of a task, which is.
type Rates struct {
	Outbound float64 `json:"outbound"`
	Inbound  float64 `json:"inbound"`
	Refused  float64 `json:"refused"` // of either direction, and not among those
}

// All is the sum.
func (r Rates) All() float64 { return r.Outbound + r.Inbound + r.Refused }

// Allocation is what one allocation does.
type Allocation struct {
	AllocID   string `json:"alloc_id"`
	Job       string `json:"job"`
	TaskGroup string `json:"task_group"`
	Interface string `json:"interface"`
	Rates
	Verdicts map[string]float64 `json:"verdicts"` // every verdict that happened, by name
}

// Destination is what tasks of this node dial.
type Destination struct {
	Destination api.FlowDestination `json:"destination"`
	Connections float64             `json:"connections"` // refused ones too
	Refused     float64             `json:"refused"`
	Sources     int                 `json:"sources"` // tasks that dial it
	Source      api.FlowSource      `json:"source"`  // the busiest of them
}

// Program is what the programs of one name take.
type Program struct {
	Name     string  `json:"name"`
	Programs int     `json:"programs"`
	Runs     float64 `json:"runs"`        // a second
	Each     float64 `json:"nanoseconds"` // of a run, in the mean
	Cores    float64 `json:"cores"`       // processors that they keep busy
}

// Process is what the agent takes.
type Process struct {
	PID    int     `json:"pid"`
	Cores  float64 `json:"cores"`
	Memory uint64  `json:"memory_bytes"`
}

// Between compares two samples.
func Between(before, after Sample) Report {
	seconds := after.At.Sub(before.At).Seconds()
	r := Report{
		Schema: 1, Time: after.At, Seconds: seconds, Notes: append([]string{}, after.Notes...),
		Allocations: []Allocation{}, Destinations: destinations(after.Traffic),
	}
	counted := make(map[uint64]map[string]uint64, len(before.Verdicts))
	for _, w := range before.Verdicts {
		counted[w.Cookie] = w.Counts
	}
	for _, w := range after.Verdicts {
		a := allocation(w, counted[w.Cookie], seconds)
		r.Total.Outbound += a.Outbound
		r.Total.Inbound += a.Inbound
		r.Total.Refused += a.Refused
		r.Allocations = append(r.Allocations, a)
	}
	slices.SortFunc(r.Allocations, func(a, b Allocation) int {
		return cmp.Or(cmp.Compare(b.All(), a.All()), cmp.Compare(a.Job, b.Job), cmp.Compare(a.AllocID, b.AllocID), cmp.Compare(a.Interface, b.Interface))
	})
	if before.Programs != nil && after.Programs != nil {
		r.Programs = programs(before.Programs, after.Programs, seconds)
	}
	if from, to := before.Traffic.Agent, after.Traffic.Agent; to.PID != 0 {
		r.Agent = &Process{PID: to.PID, Memory: to.Memory}
		if from.PID == to.PID { // else it was started anew
			r.Agent.Cores = (to.CPU - from.CPU) / seconds
		}
	}
	if lost := after.Traffic.Lost + after.Traffic.Omitted; lost > 0 {
		r.Notes = append(r.Notes, fmt.Sprintf("%d connections are not among the destinations: more than the agent has room for", lost))
	}
	return r
}

func allocation(w inspect.WorkloadVerdicts, before map[string]uint64, seconds float64) Allocation {
	a := Allocation{AllocID: cmp.Or(w.ID, w.Key.ContainerID), Job: w.Job, TaskGroup: w.Group, Interface: w.Key.IfName, Verdicts: make(map[string]float64)}
	for _, verdict := range bpfmap.AllVerdicts() {
		name := verdict.String()
		count := w.Counts[name] - before[name]
		if count == 0 {
			continue
		}
		rate := float64(count) / seconds
		a.Verdicts[name] = rate
		switch {
		case !verdict.IsConnection() || verdict == bpfmap.Proxy:
		case verdict.Refused():
			a.Refused += rate
		case api.DirectionOf(verdict) == api.DirectionInbound:
			a.Inbound += rate
		default:
			a.Outbound += rate
		}
	}
	return a
}

// destinations joins the edges that tasks make by what they dial.
func destinations(traffic api.Traffic) []Destination {
	type sum struct {
		Destination
		sources map[api.FlowSource]uint64
	}
	seconds := traffic.Until.Sub(traffic.Since).Seconds()
	sums := make(map[api.FlowDestination]*sum)
	for _, edge := range traffic.Edges {
		if edge.Direction != api.DirectionOutbound || edge.Verdict == bpfmap.Proxy.String() {
			continue
		}
		to := sums[edge.Destination]
		if to == nil {
			to = &sum{Destination: Destination{Destination: edge.Destination}, sources: make(map[api.FlowSource]uint64)}
			sums[edge.Destination] = to
		}
		to.Connections += float64(edge.Count) / seconds
		if edge.Refused {
			to.Refused += float64(edge.Count) / seconds
		}
		to.sources[edge.Source] += edge.Count
	}
	list := make([]Destination, 0, len(sums))
	for _, to := range sums {
		var most uint64
		for source, count := range to.sources {
			if count > most || count == most && source.AllocID < to.Source.AllocID {
				to.Source, most = source, count
			}
		}
		to.Sources = len(to.sources)
		list = append(list, to.Destination)
	}
	slices.SortFunc(list, func(a, b Destination) int {
		return cmp.Or(cmp.Compare(b.Connections, a.Connections), strings.Compare(a.Destination.Service, b.Destination.Service),
			a.Destination.IP.Compare(b.Destination.IP), cmp.Compare(a.Destination.Port, b.Destination.Port))
	})
	return list
}

func programs(before, after []runstats.RunTime, seconds float64) []Program {
	counted := make(map[string]runstats.RunTime, len(before))
	for _, p := range before {
		counted[p.Name] = p
	}
	list := make([]Program, 0, len(after))
	for _, p := range after {
		from := counted[p.Name]
		if p.Runs < from.Runs || p.Time < from.Time {
			from = runstats.RunTime{} // they were replaced, or some of them ended
		}
		rate := Program{Name: p.Name, Programs: p.Programs, Runs: float64(p.Runs-from.Runs) / seconds, Cores: (p.Time - from.Time).Seconds() / seconds}
		if runs := p.Runs - from.Runs; runs > 0 {
			rate.Each = float64((p.Time - from.Time).Nanoseconds()) / float64(runs)
		}
		list = append(list, rate)
	}
	slices.SortFunc(list, func(a, b Program) int { return cmp.Or(cmp.Compare(b.Cores, a.Cores), strings.Compare(a.Name, b.Name)) })
	return list
}
