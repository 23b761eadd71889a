// SPDX-License-Identifier: MPL-2.0

package maintain

import (
	"errors"

	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/program"
)

// unloadReport is what unload prints as JSON.
type unloadReport struct {
	Schema  int               `json:"schema"`
	Removed []program.Removal `json:"removed"`
}

func NewUnload(env base.Env) *base.Command {
	c := base.New(env, "unload", "Remove the data path from this node", `  Removes every link, program, map and record, this version's and older ones',
  and says what it removed.

  It refuses while it redirects or guards allocations that run, names them and says
  what they would lose. Drain the node first: nomad node drain -enable -self. An
  upgrade needs no unload: weir load takes running workloads along.

  With -force those allocations run on without a redirect: new connections of theirs
  no longer reach their Envoy.

  Unload a node that was drained:

      $ weir unload`).WithPaths().WithJSON()
	force := c.Flags.Bool("force", false, "go on although allocations that run lose their redirect and their guard")
	c.Do = func() (int, error) {
		if !*force {
			if err := refuseWhileRedirected(c); err != nil {
				return 1, err
			}
		}
		removed, err := c.Datapath().Unload()
		if c.JSON {
			if removed == nil {
				removed = []program.Removal{}
			}
			return 0, errors.Join(c.PrintJSON(unloadReport{Schema: base.Schema, Removed: removed}), err)
		}
		for _, what := range removed {
			c.UI.Output("removed " + what.String())
		}
		if err == nil && len(removed) == 0 {
			c.UI.Output("nothing to do: nothing is loaded")
		}
		return 0, err
	}
	return c
}

// refuseWhileRedirected is an error where allocations that run would lose something.
func refuseWhileRedirected(c *base.Command) error {
	stripped, err := redirected(c)
	if err == nil && len(stripped) > 0 {
		err = refusal(stripped)
	}
	return err
}
