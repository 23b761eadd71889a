// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/workload"
)

// checkSome verifies a few workloads, so that all have their turn whatever
// their number.
func (a *Agent) checkSome() {
	count := min(checksPerTick, len(a.managed))
	if len(a.managed) > fewWorkloads {
		count /= 2
	}
	var keys []workload.AttachmentID
	for range count {
		if key := a.managed[a.nextTurn%len(a.managed)]; a.allocations[key] != nil { // else it went meanwhile
			keys = append(keys, key)
		}
		a.nextTurn++
	}
	if len(keys) == 0 {
		return
	}
	for _, checked := range a.datapath.CheckSome(keys) { // the pass began with a repair
		a.checked(checked.Key, checked.Repaired, checked.Err)
	}
}

// checkUnhooked verifies the workloads whose lookup program somebody unpinned.
// One whose ADD or DEL is under way is found in order once they let go of the
// node's lock.
func (a *Agent) checkUnhooked() {
	keys, err := a.datapath.LookupsMissing()
	if err != nil {
		a.warnOnce("look at lookup programs", err)
	}
	for _, key := range keys {
		if a.allocations[key] != nil {
			a.check(key)
		}
	}
}

func (a *Agent) check(key workload.AttachmentID) {
	if a.allocations[key] == nil {
		return // it went meanwhile
	}
	repairs, err := a.datapath.Check(key, "")
	a.checked(key, repairs, err)
}

// checked notes what a check found.
func (a *Agent) checked(key workload.AttachmentID, repairs []program.Repair, err error) {
	a.count(func(c *api.Counts) { c.Repaired += uint64(len(repairs)) })
	for _, what := range repairs {
		if what.Kind.OfNode() {
			a.noteRepaired(what)
			continue
		}
		a.log.Warn("workload repaired", "alloc_id", key.ContainerID, "interface", key.IfName, "what", what)
		a.changes.Workload(a.allocations[key].view, api.ChangeRepaired, what.String(), time.Now())
	}
	if ends(err) {
		a.allocations[key].place.Forget()
		a.pruned = time.Time{}
		a.trigger()
		return
	}
	a.note(key, a.allocations[key], "check", err)
}
