// SPDX-License-Identifier: MPL-2.0

package api

import (
	"context"
	"net/url"
	"time"
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
	Through     FlowThrough     `json:"through,omitzero"`
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
	return Edge{Direction: f.Direction, Source: s, Destination: f.Destination, Through: f.Through, Verdict: f.Verdict, Refused: f.Refused}
}

// ReadTraffic asks the agent whose state is in stateDir who talked to what since a
// moment.
func ReadTraffic(ctx context.Context, stateDir string, since time.Time) (Traffic, error) {
	const limit = 16 << 20 // bytes; an edge has some five hundred
	return readJSON[Traffic](ctx, stateDir, "/v1/traffic?since="+url.QueryEscape(since.Format(time.RFC3339Nano)), limit, nil)
}
