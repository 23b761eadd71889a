// SPDX-License-Identifier: MPL-2.0

package main

func newUnload(env env) *command {
	c := newCommand(env, "unload", "Remove the data path from this node", `  Removes every link, program, map and record, this version's and older ones',
  and says what it removed. Allocations that run go on without a redirect: new
  connections of theirs no longer reach their Envoy.`).withPaths().withJSON()
	c.do = func() (int, error) {
		removed, err := c.datapath().Unload()
		if c.json {
			if removed == nil {
				removed = []string{}
			}
			if err := c.printJSON(removed); err != nil {
				return 1, err
			}
			return 0, err
		}
		for _, what := range removed {
			c.ui.Output("removed " + what)
		}
		if err == nil && len(removed) == 0 {
			c.ui.Output("nothing to do: nothing is loaded")
		}
		return 0, err
	}
	return c
}
