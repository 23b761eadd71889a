// SPDX-License-Identifier: MPL-2.0

package api

import (
	"context"
	"errors"
	"net/url"
	"time"
)

// Change is something that became different on the node.
type Change struct {
	Time      time.Time  `json:"time"`
	Kind      ChangeKind `json:"kind"`
	AllocID   string     `json:"alloc_id"` // empty: the node's
	Namespace string     `json:"namespace"`
	Job       string     `json:"job"`
	TaskGroup string     `json:"task_group"`
	What      string     `json:"what"`
	Code      string     `json:"code"`     // of the problem that began or is over; empty: it is none
	Severity  string     `json:"severity"` // ... and its severity
}

// ChangeKind says what became different.
type ChangeKind string

// The kinds of changes.
const (
	ChangeAgent    ChangeKind = "agent"    // it began, or took a configuration
	ChangeAdded    ChangeKind = "added"    // an allocation came under Weir
	ChangeRemoved  ChangeKind = "removed"  // ... and is so no more
	ChangeState    ChangeKind = "state"    // what the agent makes of an allocation that is not under Weir
	ChangeConfig   ChangeKind = "config"   // what Consul and the operator want of it is another
	ChangeProblem  ChangeKind = "problem"  // something is wrong since
	ChangeSolved   ChangeKind = "solved"   // ... and no more
	ChangeRepaired ChangeKind = "repaired" // what somebody had taken away was put back
)

// ChangeList is what changed on the node since a moment, the oldest first.
type ChangeList struct {
	Schema  int       `json:"schema"`
	Since   time.Time `json:"since"`   // of the list: when it was asked for, or the agent's beginning
	Began   time.Time `json:"began"`   // the agent did; it knows of nothing before
	Omitted uint64    `json:"omitted"` // changes that gave way to later ones, of any time
	Changes []Change  `json:"changes"`
}

// ErrNoChanges says that the agent keeps no list of changes.
var ErrNoChanges = errors.New("the agent keeps no list of changes: it is of a version before")

// ReadChanges asks the agent whose state is in stateDir what changed since a moment.
func ReadChanges(ctx context.Context, stateDir string, since time.Time) (ChangeList, error) {
	const limit = 16 << 20 // bytes; a change has some five hundred, and there are few thousands
	return readJSON[ChangeList](ctx, stateDir, "/v1/changes?since="+url.QueryEscape(since.Format(time.RFC3339Nano)), limit, ErrNoChanges)
}
