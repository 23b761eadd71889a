// SPDX-License-Identifier: MPL-2.0

package maintain

import (
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/loader"
)

// loadReport is what load prints as JSON.
type loadReport struct {
	Schema int `json:"schema"`
	loader.Result
}

func NewLoad(env base.Env) *base.Command {
	c := base.New(env, "load", "Load or upgrade the data path of this node", `  Loads the programs, attaches them at the cgroup-v2 root and pins them; or
  replaces them by this version's, with every map and every workload kept. It
  may be called at any time and does nothing when all is in place. The plugin
  does the same at the first ADD of a node that has nothing loaded.

  Bring the node to this program's version:

      $ weir load`).WithPaths().WithJSON()
	c.Do = func() (int, error) {
		result, err := c.Datapath().Load()
		if err != nil {
			return 1, err
		}
		if c.JSON {
			return 0, c.PrintJSON(loadReport{Schema: base.Schema, Result: result})
		}
		for _, problem := range result.Problems {
			c.UI.Error("did not come along: " + problem.Text())
		}
		if !result.Changed {
			c.UI.Output("nothing to do: the data path is loaded and of this version")
		} else {
			for _, what := range result.Did {
				c.UI.Output(what.String())
			}
		}
		if _, running, _ := c.Agent(); !running {
			c.UI.Output("no agent answers, so plain connect jobs are not guarded; next: " + base.StartAgent)
		}
		return 0, nil
	}
	return c
}
