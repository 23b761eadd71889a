// SPDX-License-Identifier: MPL-2.0

package main

import "github.com/weirmesh/weir/redirect/loader"

// loadReport is what load prints as JSON.
type loadReport struct {
	Schema int `json:"schema"`
	loader.Result
}

func newLoad(env env) *command {
	c := newCommand(env, "load", "Load or upgrade the data path of this node", `  Loads the programs, attaches them at the cgroup-v2 root and pins them; or
  replaces them by this version's, with every map and every workload kept. It
  may be called at any time and does nothing when all is in place. The plugin
  does the same at the first ADD of a node that has nothing loaded.

  Bring the node to this program's version:

      $ weir load`).withPaths().withJSON()
	c.do = func() (int, error) {
		result, err := c.datapath().Load()
		if err != nil {
			return 1, err
		}
		if c.json {
			return 0, c.printJSON(loadReport{Schema: jsonSchema, Result: result})
		}
		for _, problem := range result.Problems {
			c.ui.Error("did not come along: " + problem.Text())
		}
		if !result.Changed {
			c.ui.Output("nothing to do: the data path is loaded and of this version")
		} else {
			for _, what := range result.Did {
				c.ui.Output(what.String())
			}
		}
		if _, running, _ := c.agent(); !running {
			c.ui.Output("no agent answers, so plain connect jobs are not guarded; next: " + startAgent)
		}
		return 0, nil
	}
	return c
}
