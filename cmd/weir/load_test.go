// SPDX-License-Identifier: MPL-2.0

package main

import (
	"testing"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/loader"
	"github.com/weirmesh/weir/redirect/program"
)

func TestLoad(t *testing.T) {
	const next = "no agent answers, so plain connect jobs are not guarded; " +
		"next: 'systemctl enable --now weir-agent', or run weir.nomad.hcl, Nomad's system job for it\n"
	want(t, try(t, &node{}, nil, "load"), outcome{stdout: "nothing to do: the data path is loaded and of this version\n" + next})
	n := &node{load: loader.Result{Changed: true, Did: []program.Repair{{Kind: program.MapsCreated, Object: "maps"}, {Kind: program.Attached, Object: "connect4"}}}}
	want(t, try(t, n, nil, "load"), outcome{stdout: "created maps\nattached connect4\n" + next})
	n.agent = &api.Status{}
	want(t, try(t, n, nil, "load"), outcome{stdout: "created maps\nattached connect4\n"})
}
