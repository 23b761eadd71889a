// SPDX-License-Identifier: MPL-2.0

package maintain

import (
	"fmt"
	"runtime"

	"github.com/weirmesh/weir/cmd/weir/base"
)

// VersionInfo is what the binary knows of itself.
type VersionInfo struct {
	Schema   int    `json:"schema"`
	Version  string `json:"version"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

func NewVersion(env base.Env) *base.Command {
	c := base.New(env, "version", "Print the version of this program", `  Prints the version of this program and what it was built with. It asks
  nothing of the node.

  Compare the programs of two nodes:

      $ weir version -json`).WithJSON()
	c.AsUser = func() bool { return true }
	c.Do = func() (int, error) {
		info := VersionInfo{Schema: base.Schema, Version: env.Version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
		if c.JSON {
			return 0, c.PrintJSON(info)
		}
		c.UI.Output(fmt.Sprintf("weir %s (%s, %s)", info.Version, info.Go, info.Platform))
		return 0, nil
	}
	return c
}
