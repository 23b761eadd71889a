// SPDX-License-Identifier: MPL-2.0

// Package refusal makes problems of the connections of a workload that were refused for a
// fault.
package refusal

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/flow"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/health"
)

// How often the counters of verdicts are read, and for how long a connection that
// was refused for a fault is a problem.
const (
	Interval = 10 * time.Second
	Memory   = time.Minute
)

// Refusals are the connections of a workload that were refused for a fault.
type Refusals struct {
	counts   map[string]uint64                // by verdict, as last read; nil: not read yet
	listened bool                             // all proxies did then
	last     map[health.ProblemCode]time.Time // when a count was last seen to have risen
}

// codes are those of problems that a rising count of a verdict is.
func codes() map[string]health.ProblemCode {
	all := map[string]health.ProblemCode{bpfmap.RefusedGuard.String(): health.ProblemGuardRefuses}
	for code := health.ProblemRefusedNoProxy; code < health.ProblemMax; code++ {
		all[code.String()] = code
	}
	return all
}

// Note takes in the counters as they are now, and reports whether the problems are
// others than before. What was counted before the first call is not of now.
func (r *Refusals) Note(counts map[string]uint64, listens bool, now time.Time) (changed bool) {
	if r.counts != nil && !maps.Equal(counts, r.counts) { // else it is at rest, as most are
		for verdict, code := range codes() {
			if counts[verdict] <= r.counts[verdict] || !r.isFault(code, counts, listens) {
				continue
			}
			if r.last == nil {
				r.last = make(map[health.ProblemCode]time.Time)
			}
			changed = changed || r.last[code].IsZero()
			r.last[code] = now
		}
	}
	told := len(r.last)
	maps.DeleteFunc(r.last, func(_ health.ProblemCode, at time.Time) bool { return now.Sub(at) >= Memory })
	r.counts, r.listened = counts, listens
	return changed || len(r.last) < told
}

// isFault leaves out what is no fault, or is told otherwise: connections while a
// proxy starts, ends, or is known not to listen, sockets beside a proxy that has its
// port, and what a guard refuses that never let anything in.
func (r *Refusals) isFault(code health.ProblemCode, counts map[string]uint64, listens bool) bool {
	switch code { //nolint:exhaustive // the others always are
	case health.ProblemRefusedNoProxy, health.ProblemRefusedInboundNoProxy:
		return r.listened && listens
	case health.ProblemRefusedListenerIdentity, health.ProblemRefusedListenerAddress, health.ProblemRefusedListenerTable:
		return !listens // else the proxy has its port, and the other socket does not
	case health.ProblemGuardRefuses:
		return counts[bpfmap.GuardAudited.String()] > 0
	}
	return true
}

// Problems tells the refusals of the last minute. again is what a guard refuses that it
// had let in, as far as it is known.
func (r *Refusals) Problems(again []flow.RefusedPort) (list []health.Problem) {
	for _, code := range slices.Sorted(maps.Keys(r.last)) {
		what, remedy := "in the last minute: "+code.Title(), remedyOf(code)
		if code == health.ProblemGuardRefuses && len(again) > 0 {
			what += ": " + refusedText(again)
			remedy = again[0].Remedy + " in its job lets it in; " + remedy
		}
		list = append(list, health.NewProblem(code, remedy, what))
	}
	return list
}

// OfGuard reports whether a guard refused in the last minute what it had let in.
func (r *Refusals) OfGuard() bool { return !r.last[health.ProblemGuardRefuses].IsZero() }

// refusedText names ports with their sources, few of many.
func refusedText(list []flow.RefusedPort) string {
	const mostPorts, mostSources = 3, 2
	var parts []string
	for _, refused := range list[:min(len(list), mostPorts)] {
		text := fmt.Sprintf("port %d from %s", refused.Port, strings.Join(refused.Sources[:min(len(refused.Sources), mostSources)], ", "))
		if more := len(refused.Sources) - mostSources; more > 0 {
			text += fmt.Sprintf(" and %d more", more)
		}
		parts = append(parts, text)
	}
	if more := len(list) - mostPorts; more > 0 {
		parts = append(parts, fmt.Sprintf("and %d more ports", more))
	}
	return strings.Join(parts, "; ")
}

func remedyOf(code health.ProblemCode) string {
	switch code { //nolint:exhaustive // the others have one remedy
	case health.ProblemGuardRefuses:
		return "'weir guard' lists ports and sources, each with the line of the job that lets it in; guard \"audit\" lets all in again"
	case health.ProblemRefusedNoProxy, health.ProblemRefusedInboundNoProxy:
		return "see the log of the proxy's task ('nomad alloc logs'): whether Envoy stopped; 'weir flows -refused' tells each connection"
	case health.ProblemRefusedBudget:
		return "exclude the CIDRs that it dials so many addresses of, in its job; 'weir workloads' shows how many it holds"
	case health.ProblemRefusedShare, health.ProblemRefusedTable:
		return "'weir status -verbose' shows which table is full; stop the allocations that dial so many destinations"
	}
	return "'weir events' tells the socket and its process; give a task that takes the proxy's port another one"
}
