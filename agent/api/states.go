// SPDX-License-Identifier: MPL-2.0

// Package api is what the agent answers on its socket, and who asks it: the types
// of status, flows, traffic and guard lists, and their client.
package api

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/workload"
)

// Stuck is since when the loop has made no turn if it makes none any more: it makes one
// every two seconds.
const Stuck = 30 * time.Second

// State says what the agent makes of an attachment. Each pass finds it anew from what there
// is: a record, the namespace, Consul's rules, a registration. It is no step after another:
// what somebody removes, puts back or starts makes any of the first five follow any other,
// and what the agent does to get on (add, restore, remove) it decides by what it sees.
// Host and unclaimed are of proxies without a namespace here, and
// become none of the others: what has a namespace has a line of its own.
type State string

// The states of an attachment, and of proxies without one.
const (
	StateOutside     State = "outside"     // not in the mesh as far as is known; not shown
	StateUnprotected State = "unprotected" // in the mesh, but not under Weir: Problems say why
	StateManaged     State = "managed"     // under Weir
	StateConsul      State = "consul"      // redirected by Consul's own rules, and left alone
	StateEnded       State = "ended"       // over, and nobody ended its network: Problems say what to do

	StateHost      State = "host"      // a gateway on the node's own network, where there is nothing to redirect or guard
	StateUnclaimed State = "unclaimed" // a proxy that no allocation of this node is known to run
)

// Status is the agent's view of the node.
type Status struct {
	Started   time.Time        `json:"started"`
	Alive     time.Time        `json:"alive"`     // the loop's last turn
	DataPath  string           `json:"data_path"` // what is wrong with it; empty: nothing
	Telemetry string           `json:"telemetry"` // where metrics and health are shown; empty: nowhere
	Docker    string           `json:"docker"`    // why what is known of containers may be old; empty: nothing
	Consul    ConsulStatus     `json:"consul"`
	Counts    Counts           `json:"counts"`
	Problems  []health.Problem `json:"problems"` // all that is wrong, and what to do about it
	Workloads []WorkloadView   `json:"workloads"`
}

// ConsulStatus says how good the agent's view of Consul is.
type ConsulStatus struct {
	Enabled bool         `json:"enabled"`
	Address string       `json:"address"`
	InSync  bool         `json:"in_sync"`
	Since   time.Time    `json:"since"`
	Error   string       `json:"error"`
	Watch   string       `json:"watch"`  // why no change tells itself; empty: it does, or is not asked to
	Hidden  bool         `json:"hidden"` // the token may not read all of the node's services
	Proxies int          `json:"proxies"`
	Counts  ConsulCounts `json:"counts"`
}

// Counts are what the agent did since it began.
type Counts struct {
	Added       uint64 `json:"added"`        // workloads put under Weir
	Changes     uint64 `json:"changes"`      // changes from Consul that were written
	Removed     uint64 `json:"removed"`      // workloads whose allocation ended
	Repaired    uint64 `json:"repaired"`     // links, pins, rows and listeners put back
	Pruned      uint64 `json:"pruned"`       // workloads whose namespace died
	Freed       uint64 `json:"freed"`        // origins given back
	Held        uint64 `json:"held"`         // connections that waited for a proxy to start
	HeldTimeout uint64 `json:"held_timeout"` // ... and were refused when the time was over
	Failures    uint64 `json:"failures"`     // steps that will be tried again
}

// WorkloadView is the agent's view of one attachment.
type WorkloadView struct {
	Key   workload.AttachmentID `json:"key"`
	ID    string                `json:"id"` // allocation ID
	Job   string                `json:"job"`
	Group string                `json:"group"`
	workload.NomadNames
	NetNS     string           `json:"netns"`
	State     State            `json:"state"`
	Mode      workload.Mode    `json:"mode,omitempty"`
	Task      string           `json:"task,omitempty"` // that the kernel took for the proxy, by cgroup, or several; empty: not known
	Guard     workload.Guard   `json:"guard,omitempty"`
	Egress    workload.Guard   `json:"egress,omitempty"`
	InSync    bool             `json:"in_sync"`             // its registration in Consul is what the kernel has
	Since     time.Time        `json:"since"`               // of State and InSync
	HeldSince time.Time        `json:"held_since,omitzero"` // since when what it dials waits for its proxy to start; zero: it does not
	Proxies   []ProxyView      `json:"proxies"`
	Open      []uint16         `json:"open"` // ports beside the proxy's listener
	Upstreams []UpstreamView   `json:"upstreams"`
	Problems  []health.Problem `json:"problems"`
}

// ProxyView is a proxy as Consul has it registered.
type ProxyView struct {
	ID       string `json:"id"`
	Kind     string `json:"kind"`
	Task     string `json:"task,omitempty"` // as Nomad names what it injects; empty: the job has a task of its own
	Inbound  uint16 `json:"inbound,omitempty"`
	Outbound uint16 `json:"outbound,omitempty"`
}

// UpstreamView is an explicit upstream. Without virtual IPs it is reached by
// its listener alone.
type UpstreamView struct {
	Name       string         `json:"name"`
	Listener   netip.AddrPort `json:"listener"`
	VirtualIPs []netip.Addr   `json:"virtual_ips"`
}

// Healthy reports whether the node is in order, and what is not in words.
func (s Status) Healthy(now time.Time) (bool, string) {
	var wrong []string
	if since := now.Sub(s.Alive); since > Stuck {
		wrong = append(wrong, fmt.Sprintf("the reconcile loop has stalled for %s", since.Round(time.Second)))
	}
	if s.DataPath != "" {
		wrong = append(wrong, s.DataPath)
	}
	return len(wrong) == 0, strings.Join(wrong, "; ")
}

// ConsulCounts are how often things happened since the agent began.
type ConsulCounts struct {
	Reads    uint64 `json:"reads"`
	Failures uint64 `json:"failures"`
	Changes  uint64 `json:"changes"` // reads that differed from the one before
	Bytes    uint64 `json:"bytes"`   // of the reads' answers
}

// SettleTime is how long an allocation may be on its way, in or out, before what
// is not in order about it counts as wrong: a registration comes and goes beside
// its namespace, and a record beside libcni's result.
const SettleTime = 10 * time.Second
