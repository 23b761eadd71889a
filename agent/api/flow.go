// SPDX-License-Identifier: MPL-2.0

package api

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/weirmesh/weir/redirect/bpfmap"
)

// Flow is one connection, with names in the place of addresses wherever the node
// or Consul know one. One with the verdict "lost" is no connection: it tells how
// many the reader does not get, and why.
type Flow struct {
	Schema      int             `json:"schema"`
	Time        time.Time       `json:"time"`
	Node        string          `json:"node"`
	Direction   Direction       `json:"direction,omitempty"` // as the workload sees it
	Verdict     string          `json:"verdict"`
	Refused     bool            `json:"refused"`
	Source      FlowSource      `json:"source,omitzero"`
	Destination FlowDestination `json:"destination,omitzero"`
	Through     FlowThrough     `json:"through,omitzero"` // of a forwarded one
	Lost        uint64          `json:"lost,omitempty"`   // how many flows this line stands for
	Cause       LossCause       `json:"cause,omitempty"`  // ... and why they are lost
}

// Direction is how a connection passes a workload.
type Direction string

// The directions.
const (
	DirectionOutbound  Direction = "outbound"
	DirectionInbound   Direction = "inbound"
	DirectionForwarded Direction = "forwarded" // through the workload's namespace
)

// LossCause says where flows were lost.
type LossCause string

// The causes of losses.
const (
	LostInKernel LossCause = "kernel" // more connections than the workload's share of the kernel's ring
	LostByReader LossCause = "reader" // this reader is slower than connections happen
	LostByMemory LossCause = "memory" // older ones gave way: the history is longer than the agent's memory for it
)

// FlowSource is who opened the connection.
type FlowSource struct {
	AllocID   string     `json:"alloc_id,omitempty"`
	Namespace string     `json:"namespace,omitempty"`
	Job       string     `json:"job,omitempty"`
	TaskGroup string     `json:"task_group,omitempty"`
	Task      string     `json:"task,omitempty"`
	PID       uint32     `json:"pid,omitempty"`
	UID       *uint32    `json:"uid,omitempty"` // known where the PID is, and of one that is held
	Command   string     `json:"command,omitempty"`
	IP        netip.Addr `json:"ip,omitzero"`
	Port      uint16     `json:"port,omitempty"`
	Service   string     `json:"service,omitempty"`
}

// FlowDestination is what was dialled.
type FlowDestination struct {
	AllocID   string     `json:"alloc_id,omitempty"`
	Namespace string     `json:"namespace,omitempty"`
	Job       string     `json:"job,omitempty"`
	TaskGroup string     `json:"task_group,omitempty"`
	Service   string     `json:"service,omitempty"`
	IP        netip.Addr `json:"ip,omitzero"`
	Port      uint16     `json:"port,omitempty"`
}

// FlowThrough is the workload through whose namespace a connection is forwarded. What
// forwards it, a container or a machine inside of it, has no name on this node.
type FlowThrough struct {
	AllocID   string `json:"alloc_id,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	Job       string `json:"job,omitempty"`
	TaskGroup string `json:"task_group,omitempty"`
}

// DirectionOf tells how a connection with the verdict passed the workload.
func DirectionOf(verdict bpfmap.Verdict) Direction {
	switch verdict { //nolint:exhaustive // all others are outbound
	case bpfmap.Inbound, bpfmap.InboundExcluded, bpfmap.GuardAudited, bpfmap.GuardEphemeral,
		bpfmap.RefusedInboundNoProxy, bpfmap.RefusedInboundUnknown, bpfmap.RefusedGuard:
		return DirectionInbound
	case bpfmap.Forwarded, bpfmap.RefusedForwarded:
		return DirectionForwarded
	}
	return DirectionOutbound
}

// FlowQuery says which flows a reader wants. All that is set must hold; Not turns
// From to Refused around together.
type FlowQuery struct {
	Follow       bool      // go on with what happens
	Last         int       // of those that were recorded: so many, the newest; 0: all, with Follow none unless Since is set
	Since, Until time.Time // zero: no bound

	From, To string   // an end: allocation (four letters of its ID or more), job, task, service, address or CIDR
	Alloc    string   // either end's allocation, or what forwards it: any prefix of its ID
	Job      string   // likewise
	Task     string   // the source's
	Service  string   // either end's
	Port     uint16   // of the destination
	Verdicts []string // one of them
	Refused  bool     // refused ones alone
	Not      bool
}

// Values are the query as /v1/flows takes it.
func (q FlowQuery) Values() url.Values {
	values := make(url.Values)
	set := func(name, value string, given bool) {
		if given {
			values.Set(name, value)
		}
	}
	set("follow", "true", q.Follow)
	set("last", strconv.Itoa(q.Last), q.Last != 0)
	set("since", q.Since.Format(time.RFC3339Nano), !q.Since.IsZero())
	set("until", q.Until.Format(time.RFC3339Nano), !q.Until.IsZero())
	for name, text := range map[string]string{
		"from": q.From, "to": q.To, "alloc": q.Alloc, "job": q.Job, "task": q.Task, "service": q.Service,
		"verdict": strings.Join(q.Verdicts, ","),
	} {
		set(name, text, text != "")
	}
	set("port", strconv.Itoa(int(q.Port)), q.Port != 0)
	set("refused", "true", q.Refused)
	set("not", "true", q.Not)
	return values
}

// ParseFlowQuery is the reverse of Values. It refuses what it does not know.
func ParseFlowQuery(values url.Values, now time.Time) (q FlowQuery, err error) {
	for _, name := range slices.Sorted(maps.Keys(values)) {
		value := values.Get(name)
		switch name {
		case "follow":
			q.Follow, err = strconv.ParseBool(value)
		case "last":
			if q.Last, err = strconv.Atoi(value); err == nil && q.Last < 0 {
				err = fmt.Errorf("%d: want a count", q.Last)
			}
		case "since":
			q.Since, err = ParseMoment(value, now)
		case "until":
			q.Until, err = ParseMoment(value, now)
		case "from":
			q.From = value
		case "to":
			q.To = value
		case "alloc":
			q.Alloc = value
		case "job":
			q.Job = value
		case "task":
			q.Task = value
		case "service":
			q.Service = value
		case "port":
			var port uint64
			port, err = strconv.ParseUint(value, 10, 16)
			q.Port = uint16(port)
		case "verdict":
			q.Verdicts = strings.Split(value, ",")
		case "refused":
			q.Refused, err = strconv.ParseBool(value)
		case "not":
			q.Not, err = strconv.ParseBool(value)
		default:
			err = errors.New("unknown")
		}
		if err != nil {
			return q, fmt.Errorf("parameter %s: %w", name, err)
		}
	}
	return q, q.check()
}

// check refuses verdicts that there are not: a filter with one would match
// nothing and say nothing.
func (q FlowQuery) check() error {
	for _, name := range q.Verdicts {
		if !slices.ContainsFunc(append(bpfmap.AllVerdicts(), bpfmap.Held), func(v bpfmap.Verdict) bool { return v.String() == name }) {
			return fmt.Errorf("unknown verdict %q: 'weir verdicts' and the runbook have them", name)
		}
	}
	return nil
}

// ParseMoment reads a time of RFC 3339, or how long ago it was.
func ParseMoment(text string, now time.Time) (time.Time, error) {
	if ago, err := time.ParseDuration(text); err == nil {
		return now.Add(-ago), nil
	}
	at, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return at, fmt.Errorf("%q: want a duration (10m) or a time (2006-01-02T15:04:05Z)", text)
	}
	return at, nil
}

// Matches reports whether the reader wants the flow, whenever it was.
func (q *FlowQuery) Matches(flow *Flow) bool {
	if q.From == "" && q.To == "" && q.Alloc == "" && q.Job == "" && q.Task == "" && q.Service == "" &&
		q.Port == 0 && len(q.Verdicts) == 0 && !q.Refused {
		return true
	}
	s, d, through := &flow.Source, &flow.Destination, &flow.Through
	all := (q.From == "" || isEnd(q.From, s.AllocID, s.Job, s.Task, s.Service, s.IP)) &&
		(q.To == "" || isEnd(q.To, d.AllocID, d.Job, "", d.Service, d.IP)) &&
		(q.Alloc == "" || strings.HasPrefix(s.AllocID, q.Alloc) || strings.HasPrefix(d.AllocID, q.Alloc) || strings.HasPrefix(through.AllocID, q.Alloc)) &&
		(q.Job == "" || s.Job == q.Job || d.Job == q.Job || through.Job == q.Job) &&
		(q.Task == "" || s.Task == q.Task) &&
		(q.Service == "" || s.Service == q.Service || d.Service == q.Service) &&
		(q.Port == 0 || d.Port == q.Port) &&
		(len(q.Verdicts) == 0 || slices.Contains(q.Verdicts, flow.Verdict)) &&
		(!q.Refused || flow.Refused)
	return all != q.Not
}

// isEnd reports whether an end of a flow is what an operator calls text.
func isEnd(text, alloc, job, task, service string, ip netip.Addr) bool {
	const leastOfID = 4 // shorter ones are names of jobs
	if text == job || text == task || text == service || len(text) >= leastOfID && strings.HasPrefix(alloc, text) {
		return true
	}
	if addr, err := netip.ParseAddr(text); err == nil {
		return addr.Unmap() == ip
	}
	prefix, err := netip.ParsePrefix(text)
	return err == nil && prefix.Contains(ip)
}

// Ended reports whether a moment is after those that the reader wants.
func (q *FlowQuery) Ended(at int64) bool { return !q.Until.IsZero() && at > q.Until.UnixNano() }

func (q *FlowQuery) SinceNano() int64 {
	if q.Since.IsZero() {
		return 0
	}
	return q.Since.UnixNano()
}
