// SPDX-License-Identifier: MPL-2.0

package main

import (
	"encoding/json"
	"testing"

	"github.com/weirmesh/weir/agent/api"
)

// Whatever a command prints as JSON is an object that names its form; for install
// see TestInstallCommand.
func TestJSONNamesItsSchema(t *testing.T) {
	for name, args := range map[string][]string{
		"status": nil, "workloads": nil, "verdicts": nil, "load": nil, "version": nil,
		"top":       {"-once", "-interval", "100ms"},
		"gc":        {"-dry-run"},
		"unload":    {"-force"},
		"uninstall": {"-dry-run", "-root", t.TempDir()},
	} {
		t.Run(name, func(t *testing.T) {
			n := &node{status: healthy(), agent: &api.Status{}}
			got := try(t, n, nil, append([]string{name, "-json"}, args...)...)
			var told struct{ Schema int }
			if err := json.Unmarshal([]byte(got.stdout), &told); err != nil || told.Schema != 1 {
				t.Errorf("it prints %+v (%v), want an object with schema 1", got, err)
			}
		})
	}
}
