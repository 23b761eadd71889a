// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/test"
)

// What becomes of an allocation, and what the agent repairs, is in the list of changes that
// it answers with; what was there before it began is none.
func TestAgentListsWhatChanged(t *testing.T) {
	n := newNode(t)
	n.transparent(numbered(1))
	n.fake.answers(registered(numbered(1)))
	n.run()
	n.eventually(numbered(1), api.StateManaged)
	began := time.Now()
	told := func(id string, kind api.ChangeKind, part string) {
		t.Helper()
		test.Eventually(t, func() error {
			list, err := api.ReadChanges(t.Context(), n.config.StateDir, began.Add(-time.Hour))
			if err == nil && !slices.ContainsFunc(list.Changes, func(c api.Change) bool {
				return c.AllocID == id && c.Kind == kind && strings.Contains(c.What, part)
			}) {
				err = fmt.Errorf("the list is %+v", list)
			}
			return err
		}, fmt.Sprintf("a change %s %q of %q", kind, part, id))
	}
	told("", api.ChangeAgent, "the agent began")

	ns := test.NewNetNS(t)
	n.cached(numbered(2), ns.Path, "")
	n.fake.answers(registered(numbered(1), numbered(2)))
	told(numbered(2), api.ChangeAdded, "under Weir, mode direct, guard audit")
	n.eventually(numbered(2), api.StateManaged)
	n.fake.answers(registeredAt(20007, numbered(2)))
	told(numbered(2), api.ChangeConfig, "inbound port 20001 -> 20007")
	told(numbered(1), api.ChangeConfig, "no registration of its proxy any more")
	if err := os.Remove(filepath.Join(n.config.PinDir, "links", "weir_getsockopt")); err != nil {
		t.Fatal(err)
	}
	told("", api.ChangeRepaired, "weir_getsockopt")
	if err := os.Remove(filepath.Join(n.config.CNI.CacheDir, "results", "nomad-"+numbered(2)+"-eth0")); err != nil {
		t.Fatal(err)
	}
	n.fake.answers(registered())
	ns.End()
	told(numbered(2), api.ChangeRemoved, "its allocation ended")

	list, err := api.ReadChanges(t.Context(), n.config.StateDir, began.Add(-time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range list.Changes {
		// What a plugin adds while the agent loads the data path comes after it began.
		if started := n.agent.Status().Started; c.Kind == api.ChangeAgent && !c.Time.Equal(started) {
			t.Errorf("the agent began at %s, and its status says at %s", c.Time, started)
		}
		if c.AllocID == numbered(1) && c.Kind == api.ChangeAdded {
			t.Errorf("%+v: it was there before the agent", c)
		}
	}
	if list, err = api.ReadChanges(t.Context(), n.config.StateDir, time.Now()); err != nil || len(list.Changes) > 0 {
		t.Errorf("of what is to come the list has %+v, %v", list, err)
	}
}

// What an agent's first pass puts under Weir is a change, although it knew nothing before.
func TestFirstPassIsAChange(t *testing.T) {
	n := newNode(t)
	n.cached(numbered(1), test.NewNetNS(t).Path, "")
	n.transparent(numbered(2))
	n.fake.answers(registered(numbered(1), numbered(2)))
	a := n.newStepwise()
	a.status.Started = time.Now()
	a.asks(t.Context())
	var added []string
	for _, c := range a.changes.List(time.Time{}).Changes {
		if c.Kind == api.ChangeAdded {
			added = append(added, c.AllocID+" "+c.What)
		}
	}
	if want := []string{numbered(1) + " under Weir, mode direct, guard audit"}; !slices.Equal(added, want) {
		t.Errorf("the first pass added %q, want %q: the other was on record", added, want)
	}
}

// A check of one allocation may find what the whole node lacks: that is no change of the
// allocation.
func TestRepairOfTheNodeIsItsChange(t *testing.T) {
	n := newNode(t)
	_, key := n.transparent(numbered(1))
	n.fake.answers(registered(numbered(1)))
	a := n.newStepwise()
	a.asks(t.Context())
	if err := os.Remove(filepath.Join(n.config.PinDir, "links", "weir_getsockopt")); err != nil {
		t.Fatal(err)
	}
	a.check(key)
	var repaired []api.Change
	for _, c := range a.changes.List(time.Time{}).Changes {
		if c.Kind == api.ChangeRepaired {
			repaired = append(repaired, c)
		}
	}
	if len(repaired) != 1 || repaired[0].AllocID != "" || repaired[0].What != "attached weir_getsockopt" {
		t.Errorf("the changes are %+v, want a repair of the node", repaired)
	}
}
