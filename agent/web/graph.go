// SPDX-License-Identifier: MPL-2.0

package web

import (
	"time"

	"github.com/weirmesh/weir/redirect/explain"
	"github.com/weirmesh/weir/redirect/health"
)

// Graph is a node's allocations, what they talk to, and how much of late.
type Graph struct {
	Schema      int              `json:"schema"`
	Node        string           `json:"node"`
	Version     string           `json:"version"`
	Time        time.Time        `json:"time"`
	Seconds     float64          `json:"seconds"`  // that rates are over
	Problems    []health.Problem `json:"problems"` // all of the node's, those of allocations too
	Unrecorded  string           `json:"unrecorded"`
	Missed      uint64           `json:"missed"` // connections that are in no rate
	Allocations []Node           `json:"allocations"`
	Ends        []End            `json:"ends"`
	Edges       []Edge           `json:"edges"`
}

// Node is one allocation.
type Node struct {
	ID        string  `json:"id"`
	Job       string  `json:"job"`
	Group     string  `json:"group"`
	Namespace string  `json:"namespace"`
	State     string  `json:"state"`
	Mode      string  `json:"mode"`
	Guard     string  `json:"guard"`
	InSync    bool    `json:"in_sync"`
	Errors    int     `json:"errors"`   // problems of that severity
	Warnings  int     `json:"warnings"` // ... of this one
	Rate      float64 `json:"rate"`     // connections a second, refused ones too
	Refused   float64 `json:"refused"`
}

// End is what is at the other end of an allocation's connections.
type End struct {
	ID      string `json:"id"`
	Kind    Kind   `json:"kind"`
	Name    string `json:"name"`
	AllocID string `json:"alloc_id,omitempty"` // of an allocation of this node
	Source  bool   `json:"source"`             // connections come from it; else they go there
}

// Kind is what an end is.
type Kind string

// The kinds of ends.
const (
	KindService    Kind = "service"
	KindAllocation Kind = "allocation" // of this node, dialled past its service
	KindAddress    Kind = "address"
	KindLoopback   Kind = "loopback" // of the allocation itself
	KindOthers     Kind = "others"   // those for which there is no room
)

// Edge is the connections between an allocation and an end, either way.
type Edge struct {
	From     string             `json:"from"`
	To       string             `json:"to"`
	Rate     float64            `json:"rate"` // connections a second, refused ones too
	Refused  float64            `json:"refused"`
	Verdicts map[string]float64 `json:"verdicts"`
}

// Allocation is what decides about an allocation's connections, and the last of them.
type Allocation struct {
	Schema     int               `json:"schema"`
	Node                         // its rates are not set
	Task       string            `json:"task"` // that is the proxy; empty: not known
	Since      time.Time         `json:"since"`
	Problems   []health.Problem  `json:"problems"`
	Settings   []explain.Setting `json:"settings"`
	Unknown    string            `json:"unknown"` // why there are no settings; empty: there are
	Flows      []Flow            `json:"flows"`   // the newest first
	Unrecorded string            `json:"unrecorded"`
}

// Flow is one connection of an allocation.
type Flow struct {
	Time      time.Time `json:"time"`
	Direction string    `json:"direction"`
	Task      string    `json:"task"` // that opened it, or the name of its program
	Peer      string    `json:"peer"` // the other end
	Verdict   string    `json:"verdict"`
	Meaning   string    `json:"meaning"` // of the verdict
	Refused   bool      `json:"refused"`
}
