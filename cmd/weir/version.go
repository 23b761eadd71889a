// SPDX-License-Identifier: MPL-2.0

package main

import (
	"fmt"
	"runtime"
)

// version is set by the linker; see VERSION in the Makefile.
var version = "v0.0.0-unknown"

// versionInfo is what the binary knows of itself.
type versionInfo struct {
	Schema   int    `json:"schema"`
	Version  string `json:"version"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

func newVersion(env env) *command {
	c := newCommand(env, "version", "Print the version of this program", `  Prints the version of this program and what it was built with. It asks
  nothing of the node.

  Compare the programs of two nodes:

      $ weir version -json`).withJSON()
	c.asUser = func() bool { return true }
	c.do = func() (int, error) {
		info := versionInfo{Schema: jsonSchema, Version: version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
		if c.json {
			return 0, c.printJSON(info)
		}
		c.ui.Output(fmt.Sprintf("weir %s (%s, %s)", info.Version, info.Go, info.Platform))
		return 0, nil
	}
	return c
}
