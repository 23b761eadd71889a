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
		if c.AllocID == numbered(1) && c.Kind == api.ChangeAdded {
			t.Errorf("%+v: it was there before the agent", c)
		}
	}
	if list, err = api.ReadChanges(t.Context(), n.config.StateDir, time.Now()); err != nil || len(list.Changes) > 0 {
		t.Errorf("of what is to come the list has %+v, %v", list, err)
	}
}
