// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/wait"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// full is a node with so many allocations, all of them in sync.
func (n *node) full(count int, change ...func(*Agent)) (ids []string) {
	n.t.Helper()
	for i := range count {
		ids = append(ids, numbered(i+1))
		n.cached(ids[i], test.NewNetNS(n.t).Path, "")
	}
	n.fake.answers(registered(ids...))
	n.run(change...)
	n.allInSync(ids, 20001)
	return ids
}

// allInSync waits until the port is in force everywhere and told to be.
func (n *node) allInSync(ids []string, port uint16) {
	n.t.Helper()
	test.Eventually(n.t, func() error {
		for _, id := range ids {
			list := n.agent.Status().Workloads
			i := slices.IndexFunc(list, func(w api.WorkloadView) bool { return w.ID == id })
			if i < 0 || !list[i].InSync {
				return fmt.Errorf("allocation %s is not in sync", id)
			}
		}
		list, err := n.Records()
		if err != nil {
			return err
		}
		for _, k := range list {
			if !k.Complete || k.MeshConfig.InboundPort != port {
				return fmt.Errorf("workload %s has port %d, want %d", k.Key, k.MeshConfig.InboundPort, port)
			}
		}
		if len(list) != len(ids) {
			return fmt.Errorf("%d workloads on record, want %d", len(list), len(ids))
		}
		return nil
	}, fmt.Sprintf("all to have port %d", port))
}

// A change of all workloads takes long. An allocation that comes meanwhile is
// under Weir, and configured, before the rest of it.
func TestNewAllocationDoesNotWaitForAChangeOfAll(t *testing.T) {
	n := newNode(t)
	n.ports = append(n.ports, mapped(20002))
	h := n.haltAt(20002, 1)
	defer h.goOn()
	ids := n.full(12, func(a *Agent) {
		a.budget.Least, a.budget.Together, a.notify = 0, 1, h.notify
	})
	all := append(slices.Clone(ids), numbered(len(ids)+1))
	n.fake.answers(registeredAt(20002, all...))
	n.agent.consul.Wake()
	h.wait(t)
	n.cached(all[len(ids)], test.NewNetNS(t).Path, "")
	test.Eventually(t, func() error {
		if !n.agent.arrived.Load() {
			return errors.New("nothing was seen")
		}
		return nil
	}, "the new allocation to be seen")
	h.goOn()

	n.allInSync(all, 20002)
	n.wasBeforeNearlyAll(all[len(ids)], ids)
}

// halt stops the agent's loop where so many allocations have the port, until goOn.
type halt struct {
	notify func(string) // the agent's
	begun  chan struct{}
	goOn   func()
}

func (n *node) haltAt(port uint16, changed int) *halt {
	begun, seen := make(chan struct{}), make(chan struct{})
	once := sync.OnceFunc(func() {
		close(begun)
		<-seen
	})
	notify := func(string) {
		list, err := n.Records()
		list = slices.DeleteFunc(list, func(k inspect.Record) bool { return k.MeshConfig.InboundPort != port })
		if err == nil && len(list) >= changed {
			once()
		}
	}
	return &halt{notify: notify, begun: begun, goOn: sync.OnceFunc(func() { close(seen) })}
}

// wait returns when the loop stands still.
func (h *halt) wait(t *testing.T) {
	t.Helper()
	select {
	case <-h.begun:
	case <-time.After(30 * time.Second):
		t.Fatal("the change does not begin")
	}
}

// wasBeforeNearlyAll wants the allocation to be written before the others, of which each
// pass changes one before it looks.
func (n *node) wasBeforeNearlyAll(id string, others []string) {
	n.t.Helper()
	configured, later := n.recorded(id), 0
	for _, other := range others {
		if n.recorded(other).After(configured) {
			later++
		}
	}
	if later < len(others)-4 {
		n.t.Errorf("the new allocation was configured before %d of the other %d, want nearly all", later, len(others))
	}
}

// recorded is when the allocation was last written.
func (n *node) recorded(id string) time.Time {
	n.t.Helper()
	info, err := os.Stat(filepath.Join(n.config.StateDir, "workloads", id+"-eth0.json"))
	if err != nil {
		n.t.Fatal(err)
	}
	return info.ModTime()
}

// Whoever watches the loop is told of each change, not of each pass: a pass may
// take longer than he waits.
func TestLoopIsAliveThroughoutAPass(t *testing.T) {
	var mu sync.Mutex
	var alive []time.Time
	n := newNode(t)
	ids := n.full(8, func(a *Agent) {
		a.budget = wait.Budget{Least: time.Hour, Most: time.Hour, Together: 2} // all in one pass
		a.notify = func(state string) {
			mu.Lock()
			defer mu.Unlock()
			if state == "WATCHDOG=1" {
				alive = append(alive, a.Status().Alive)
			}
		}
	})
	passes := n.agent.consul.Current().Counts.Changes
	mu.Lock()
	alive = nil
	mu.Unlock()
	n.fake.answers(registeredAt(20002, ids...))
	n.agent.consul.Wake()
	n.allInSync(ids, 20002)
	if changes := n.agent.consul.Current().Counts.Changes; changes != passes+1 {
		t.Fatalf("Consul's answer changed %d times, want once", changes-passes)
	}
	mu.Lock()
	defer mu.Unlock()
	if moments := len(slices.Compact(alive)); moments < len(ids)/2 {
		t.Errorf("%d signs of life at %d moments while %d workloads changed two at a time, want one for each two", len(alive), moments, len(ids))
	}
}

func TestUrgency(t *testing.T) {
	key := func(name string) workload.AttachmentID { return workload.AttachmentID{ContainerID: name} }
	known := func(guard workload.Guard) *inspect.Record {
		return &inspect.Record{MeshConfig: workload.MeshConfig{Guard: guard}}
	}
	allocations := []desired.Allocation{
		{Attachment: discover.Attachment{Key: key("broken")}},
		{Attachment: discover.Attachment{Key: key("configured")}, Record: known(workload.GuardAudit)},
		{Attachment: discover.Attachment{Key: key("added")}, Record: known("")},
		{Attachment: discover.Attachment{Key: key("new")}},
	}
	a := &Agent{allocations: map[workload.AttachmentID]*allocState{key("broken"): {}, key("configured"): {}, key("added"): {}}}
	a.allocations[key("broken")].steps.Note("add", errors.New("denied"), time.Now())
	a.byUrgency(allocations)
	var got []string
	for _, s := range allocations {
		got = append(got, s.Key.ContainerID)
	}
	if want := []string{"new", "added", "configured", "broken"}; !slices.Equal(got, want) {
		t.Errorf("order is %q, want %q", got, want)
	}
}

// Allocations that are found come under Weir several at once, each whole: no change
// follows, and one pass brings all of them in sync. One that cannot be added keeps none out.
func TestFoundAllocationsJoinWhole(t *testing.T) {
	n := newNode(t)
	var ids []string
	for i := range addsTogether + 4 {
		ids = append(ids, numbered(i+1))
		n.cached(ids[i], test.NewNetNS(t).Path, "")
	}
	lost := numbered(len(ids) + 1)
	n.cached(lost, n.config.StateDir+"/nowhere", "")
	n.fake.answers(registered(append(slices.Clone(ids), lost)...))
	a := n.newStepwise()
	a.asks(t.Context())
	for _, w := range a.Status().Workloads {
		if there := w.ID != lost; w.InSync != there {
			t.Errorf("after one pass %s is %+v", w.ID, w)
		}
	}
	if counts := a.Status().Counts; counts.Added != uint64(len(ids)) || counts.Changes != 0 {
		t.Errorf("after one pass: %+v, want %d additions and no change", counts, len(ids))
	}
	n.agent = a
	n.allInSync(ids, 20001)
}
