// SPDX-License-Identifier: MPL-2.0

package api

import (
	"context"
	"time"
)

// EgressEntry is what one task sent past its proxy to one port of one address, or
// the sockets of one kind that it made.
type EgressEntry struct {
	AllocID     string    `json:"alloc_id"`
	Job         string    `json:"job"`
	TaskGroup   string    `json:"task_group"`
	Task        string    `json:"task"`    // empty where it is not known
	Command     string    `json:"command"` // the name that the process of the last one gives itself
	UID         uint32    `json:"uid"`     // ... its user
	Transport   string    `json:"transport"`
	Destination string    `json:"destination"` // allocation of this node as job/group/ID, service, or address; empty for a socket
	Port        uint16    `json:"port"`
	Verdict     string    `json:"verdict"` // of the last one
	Count       uint64    `json:"count"`   // datagrams that were sent, connects, or sockets
	First       time.Time `json:"first"`
	Last        time.Time `json:"last"`
	Remedy      string    `json:"remedy"` // what of the job lets it out
}

// GuardList is what came in past the proxies of a node's allocations since the
// agent began to record: what guard "enforce" refuses, or would refuse.
type GuardList struct {
	Schema  int           `json:"schema"`
	Since   time.Time     `json:"since"`
	Entries []GuardEntry  `json:"entries"`
	Egress  []EgressEntry `json:"egress"`  // what left past the proxies, or would have
	Omitted uint64        `json:"omitted"` // connections for which the table has no entry: it was full
	Lost    uint64        `json:"lost"`    // connections of any kind that the kernel could not tell of
}

// GuardEntry is what came from one source to one port of an allocation.
type GuardEntry struct {
	AllocID   string    `json:"alloc_id"`
	Job       string    `json:"job"`
	TaskGroup string    `json:"task_group"`
	Protocol  string    `json:"protocol"` // tcp or udp by who serves the port now; empty where nobody or both do
	Port      uint16    `json:"port"`
	Source    string    `json:"source"`  // allocation of this node as job/group/ID, or an address
	Verdict   string    `json:"verdict"` // of the last one: guard_audit or refused_guard
	Count     uint64    `json:"count"`   // connections over TCP, datagrams over UDP
	First     time.Time `json:"first"`
	Last      time.Time `json:"last"`
	Remedy    string    `json:"remedy"` // the line of the job that lets it in
}

// ReadGuard asks the agent whose state is in stateDir for what came in past the
// proxies.
func ReadGuard(ctx context.Context, stateDir string) (GuardList, error) {
	const limit = 16 << 20 // bytes; an entry has some three hundred
	return readJSON[GuardList](ctx, stateDir, "/v1/guard", limit, ErrFlowsOff)
}
