// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/weirmesh/weir/redirect/health"
)

// Workload is what "weir workloads -json" tells of an allocation.
type Workload struct {
	ID, Job, Group, NetNS, Cookie string
	Mode, Guard                   string
	Addresses                     []string
	Proxy                         struct {
		UID               uint32
		Identity          string
		Inbound, Outbound uint16
		Listeners         int
	}
	Notes    []string
	Problems []health.Problem
	// Agent is what the agent adds; nil where it does not run.
	Agent *struct {
		State, Guard string
		Problems     []health.Problem
	}
}

// Weir runs a command of Weir's on the node that prints JSON, and reads it.
func (n *Node) Weir(answer any, args ...string) error {
	text, err := n.Try(n.weir(), args...)
	if text == "" && err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(text), answer); err != nil {
		return fmt.Errorf("read answer of weir %q: %w: %s", args, err, text)
	}
	return nil
}

// Workloads is what "weir workloads" tells.
func (n *Node) Workloads() []Workload {
	n.tb.Helper()
	list, err := n.tryWorkloads()
	if err != nil {
		n.tb.Fatal(err)
	}
	return list
}

func (n *Node) tryWorkloads() ([]Workload, error) {
	var told struct{ Workloads []Workload }
	err := n.Weir(&told, "workloads", "-json")
	return told.Workloads, err
}

// Workload is what "weir workloads" tells of the allocation.
func (a *Alloc) Workload() Workload {
	a.node.tb.Helper()
	for _, w := range a.node.Workloads() {
		if w.ID == a.ID {
			return w
		}
	}
	a.node.tb.Fatalf("allocation %s of %s/%s is no workload of Weir's", a.ID, a.JobID, a.Group)
	panic("unreachable")
}

// EventuallyWorkload waits until the allocation is a workload that passes the
// check: the agent may still be about to see it.
func (a *Alloc) EventuallyWorkload(what string, check func(Workload) bool) (found Workload) {
	a.node.tb.Helper()
	eventually(a.node.tb, 30*time.Second, func() error {
		for _, w := range a.node.Workloads() {
			if w.ID == a.ID {
				if found = w; check(w) {
					return nil
				}
				return fmt.Errorf("it is %+v", w)
			}
		}
		return fmt.Errorf("allocation %s is no workload", a.ID)
	}, what)
	return found
}

// Verdicts are the counters of the allocation, by the verdicts' names.
func (a *Alloc) Verdicts() map[string]uint64 {
	a.node.tb.Helper()
	var told struct {
		Workloads []struct {
			ID     string
			Counts map[string]uint64
		}
	}
	if err := a.node.Weir(&told, "verdicts", "-json"); err != nil {
		a.node.tb.Fatal(err)
	}
	for _, w := range told.Workloads {
		if w.ID == a.ID {
			return w.Counts
		}
	}
	a.node.tb.Fatalf("allocation %s of %s/%s has no verdicts", a.ID, a.JobID, a.Group)
	panic("unreachable")
}
