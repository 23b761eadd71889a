// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"errors"
	"fmt"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/program"
	"golang.org/x/sys/unix"
)

// lockTimeout is how long a step waits for another process's change: the loop
// has to turn, and to tell of it, where that does not end.
const lockTimeout = 10 * time.Second

// load brings the data path to this version. Where nobody could look at it, or
// change it, what is in force stays, and it is tried again.
func (a *Agent) load() error {
	loaded, err := a.datapath.Load()
	_, a.behind = inspect.CouldNotLook(err)
	if err != nil && !a.behind {
		return fmt.Errorf("load data path: %w", err)
	}
	if err != nil {
		a.log.Error("data path cannot be loaded or upgraded now", "error", err)
	}
	for _, did := range loaded.Did {
		a.log.Info("data path", "did", did)
	}
	if steps := len(loaded.Did); steps > 0 {
		a.changes.Note(api.Change{Time: time.Now(), Kind: api.ChangeAgent, What: fmt.Sprintf("the data path was loaded, in %d steps: %s …", steps, loaded.Did[0])})
	}
	for _, problem := range loaded.Problems {
		a.log.Error("data path: a workload did not come along", "problem", problem)
	}
	return nil
}

// noteRepaired tells what of the node was put back.
func (a *Agent) noteRepaired(what program.Repair) {
	a.log.Warn("data path repaired", "what", what)
	a.changes.Note(api.Change{Time: time.Now(), Kind: api.ChangeRepaired, What: what.String()})
}

// repair puts back what somebody took off the node, and says so.
// It reports whether the node could be changed at all.
func (a *Agent) repair() bool {
	if a.behind {
		if err := a.load(); err != nil {
			a.warnOnce("load data path", err)
		}
	}
	did, err := a.datapath.Repair()
	reason, _ := inspect.CouldNotLook(err)
	a.mu.Lock()
	a.status.Counts.Repaired += uint64(len(did))
	a.status.DataPath, a.unseen.Node = "", reason
	if err != nil {
		a.status.DataPath = err.Error()
	}
	a.mu.Unlock()
	for _, what := range did {
		a.noteRepaired(what)
	}
	if text := errorText(err); text != a.broken {
		a.broken = text
		if err != nil {
			a.log.Error("data path cannot be repaired", "error", err)
		} else {
			a.log.Info("data path is whole again")
		}
	}
	if len(did) > 0 {
		a.trigger()
	}
	return !errors.Is(err, unix.EAGAIN)
}
