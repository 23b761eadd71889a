// SPDX-License-Identifier: MPL-2.0

package host

import (
	"fmt"
	"iter"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Processes remembers for a moment in which network namespace each process of the node
// is, so that who looks for one process in each of many namespaces does not ask every
// process for each of them. It looks no further than it has to. What it remembers is
// asked again before it counts, and what it does not find is looked for anew.
type Processes struct {
	mu     sync.Mutex
	listed time.Time
	left   []int            // not asked yet
	in     map[uint64][]int // by the namespace's inode
	asked  int              // processes that were asked where they are
}

// processesAge is how long a list is good enough to begin with.
const processesAge = time.Second

// eachOwner is EachOwner of the namespace.
func (p *Processes) eachOwner(ns *Namespace, socket uint32, visit func(pid, number int) (done bool, err error)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	anew := time.Since(p.listed) > processesAge
	for {
		if anew {
			if err := p.list(); err != nil {
				return err
			}
		}
		for pid := range p.inside(ns) {
			if done, err := eachDescriptor(pid, socket, visit); done || err != nil {
				return err
			}
		}
		if anew {
			return ErrNoOwner
		}
		anew = true // it may have come since
	}
}

// inside are the processes of the list that are in the namespace: first those that were
// found there before, then those that nobody asked yet.
func (p *Processes) inside(ns *Namespace) iter.Seq[int] {
	return func(yield func(int) bool) {
		for _, pid := range p.in[ns.Inode] {
			if p.namespaceOf(pid) == ns.Inode && !yield(pid) {
				return
			}
		}
		for len(p.left) > 0 {
			pid := p.left[0]
			p.left = p.left[1:]
			where := p.namespaceOf(pid)
			p.in[where] = append(p.in[where], pid)
			if where == ns.Inode && !yield(pid) {
				return
			}
		}
	}
}

func (p *Processes) list() error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return fmt.Errorf("list processes: %w", err)
	}
	p.listed, p.left, p.in = time.Now(), nil, make(map[uint64][]int)
	for _, entry := range entries {
		if pid, err := strconv.Atoi(entry.Name()); err == nil {
			p.left = append(p.left, pid)
		}
	}
	return nil
}

// namespaceOf is the inode of the process's network namespace; 0 of one that ended.
func (p *Processes) namespaceOf(pid int) uint64 {
	p.asked++
	var stat unix.Stat_t
	if unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &stat) != nil {
		return 0
	}
	return stat.Ino
}
