// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"testing"
)

func TestUnload(t *testing.T) {
	want(t, try(t, &node{}, nil, "unload"), outcome{stdout: "nothing to do: nothing is loaded\n"})
	want(t, try(t, &node{}, nil, "unload", "-json"), outcome{stdout: "{\n  \"schema\": 1,\n  \"removed\": []\n}\n"})
	n := &node{removed: []string{"link connect4", "map origins"}}
	want(t, try(t, n, nil, "unload"), outcome{stdout: "removed link connect4\nremoved map origins\n"})
}

// What was removed is told also where something could not be.
func TestUnloadInPart(t *testing.T) {
	n := &node{removed: []string{"link connect4"}, err: errors.New("remove map origins: busy")}
	want(t, try(t, n, nil, "unload"), outcome{code: 1, stderr: "weir unload: remove map origins: busy\n"}) // nor is it known who runs
	want(t, try(t, n, nil, "unload", "-force"), outcome{
		code: 1, stdout: "removed link connect4\n", stderr: "weir unload: remove map origins: busy\n",
	})
}
