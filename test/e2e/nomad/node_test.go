// SPDX-License-Identifier: MPL-2.0

// Package nomad runs real job files on a whole real node: see test/nomad.
package nomad

import (
	"testing"

	"github.com/weirmesh/weir/test/nomad"
)

// TestNode runs the cases that leave the node as they found it, on one node. A
// case is a function of a file beside this one.
func TestNode(t *testing.T) {
	node := nomad.Start(t, nomad.Options{Conflists: []string{"testdata/weir6.conflist"}})
	for _, each := range []struct {
		name string
		test func(*testing.T, *nomad.Node)
	}{
		{"Fingerprint", fingerprint},
		{"TransparentDocker", transparentDocker},
		{"TransparentExec", transparentExec},
		{"Exclusions", exclusions},
		{"Gateways", gateways},
		{"GuardedUpstreams", guardedUpstreams},
		{"EnvoyUID", envoyUID},
		{"SilentProxy", silentProxy},
		{"CNIWeirDocker", cniWeirDocker},
		{"CNIWeirGateways", cniWeirGateways},
		{"CNIWeirArgs", cniWeirArgs},
		{"CNIWeirSix", cniWeirSix},
		{"CNIWeirPair", cniWeirPair},
		{"CNIWeirTwo", cniWeirTwo},
		{"CNIWeirChained", cniWeirChained},
		{"FlushedRules", flushedRules}, // last: it takes Nomad's own rules too
	} {
		t.Run(each.name, func(t *testing.T) { each.test(t, node.For(t)) })
	}
	if !t.Failed() {
		node.ExpectNothingLeft()
	}
}
