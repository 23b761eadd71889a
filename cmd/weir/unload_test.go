// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"testing"

	"github.com/weirmesh/weir/redirect/program"
)

func TestUnload(t *testing.T) {
	want(t, try(t, &node{}, nil, "unload"), outcome{stdout: "nothing to do: nothing is loaded\n"})
	want(t, try(t, &node{}, nil, "unload", "-json"), outcome{stdout: "{\n  \"schema\": 1,\n  \"removed\": []\n}\n"})
	n := &node{removed: []program.Removal{{Kind: program.PinRemoved, Object: "/sys/fs/bpf/weir/maps/origins"}, {Kind: program.WorkloadRemoved, Object: "a-eth0"}}}
	want(t, try(t, n, nil, "unload"), outcome{stdout: "removed pin /sys/fs/bpf/weir/maps/origins\nremoved workload a-eth0\n"})
}

// What was removed is told also where something could not be.
func TestUnloadInPart(t *testing.T) {
	n := &node{removed: []program.Removal{{Kind: program.PinRemoved, Object: "/sys/fs/bpf/weir/links/connect4"}}, err: errors.New("remove map origins: busy")}
	want(t, try(t, n, nil, "unload"), outcome{code: 1, stderr: "weir unload: remove map origins: busy\n"}) // nor is it known who runs
	want(t, try(t, n, nil, "unload", "-force"), outcome{
		code: 1, stdout: "removed pin /sys/fs/bpf/weir/links/connect4\n", stderr: "weir unload: remove map origins: busy\n",
	})
}
