// SPDX-License-Identifier: MPL-2.0

// Package change keeps what became different on a node of late, in memory: which
// allocations came and went, what is wanted of them, what went wrong and what was put
// back. Any goroutine may note and read.
package change

import (
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weirmesh/weir/agent/api"
)

// How many changes are kept, and how many of them may be one allocation's: one that
// changes without end takes nobody else's place.
const (
	most      = 4096
	mostOfOne = 64
	longest   = 500 // bytes of text
)

// Log is the changes of a node. It outlives an agent that takes a new configuration.
type Log struct {
	began time.Time

	mu       sync.Mutex
	list     []api.Change
	omitted  uint64
	problems map[problemKey]problem // that there are
}

// NewLog is empty: nothing is known of what was before.
func NewLog(now time.Time) *Log {
	return &Log{began: now, problems: make(map[problemKey]problem)}
}

// Note adds a change.
func (l *Log) Note(c api.Change) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.note(c)
}

func (l *Log) note(c api.Change) {
	if len(c.What) > longest {
		c.What = strings.ToValidUTF8(c.What[:longest], "") + "…"
	}
	of := func(other api.Change) bool { return other.AllocID == c.AllocID }
	oldest, count := -1, 0
	for i := range l.list {
		if of(l.list[i]) {
			if count++; oldest < 0 {
				oldest = i
			}
		}
	}
	switch {
	case count >= mostOfOne:
		l.drop(oldest)
	case len(l.list) >= most:
		l.drop(0)
	}
	l.list = append(l.list, c)
}

func (l *Log) drop(i int) {
	l.list = slices.Delete(l.list, i, i+1)
	l.omitted++
}

// List is what changed since a moment.
func (l *Log) List(since time.Time) api.ChangeList {
	l.mu.Lock()
	defer l.mu.Unlock()
	list := api.ChangeList{Schema: 1, Since: since, Began: l.began, Omitted: l.omitted, Changes: []api.Change{}}
	if l.began.After(since) {
		list.Since = l.began
	}
	for _, c := range l.list {
		if !c.Time.Before(since) {
			list.Changes = append(list.Changes, c)
		}
	}
	return list
}
