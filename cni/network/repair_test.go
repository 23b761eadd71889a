// SPDX-License-Identifier: MPL-2.0

package network

import (
	"testing"

	"github.com/weirmesh/weir/test"
)

// What somebody flushed comes back without a CHECK of each allocation.
func TestRepairOfAllNetworks(t *testing.T) {
	n := newNode(t)
	if repaired := n.repair(t); repaired != nil {
		t.Errorf("without a network: %q", repaired)
	}
	first, _ := n.added(t, "without")
	a, _ := n.mapped(8080, 80).added(t, "first")
	b, _ := n.mapped(9090, 80).added(t, "second")
	for _, with := range []*allocation{a, b} {
		test.Echo(t, with.ns, "tcp", ":80")
	}
	before := n.run(t, "nft", "-s", "list", "ruleset")
	if repaired := n.repair(t); len(repaired) > 0 {
		t.Errorf("nothing is missing: repaired %q", repaired)
	}
	if after := n.run(t, "nft", "-s", "list", "ruleset"); after != before {
		t.Errorf("nothing is missing, rules changed:\n%s\nbefore:\n%s", after, before)
	}
	n.run(t, "nft", "flush", "ruleset")
	if repaired := n.repair(t); len(repaired) == 0 {
		t.Error("all was flushed: nothing repaired")
	}
	for _, address := range []string{"192.0.2.1:8080", "[2001:db8::1]:9090"} {
		if err := test.DialErr(t, n.outside, address); err != nil {
			t.Errorf("%s: %v", address, err)
		}
	}
	test.Echo(t, n.outside, "tcp", ":7070")
	answer, err := test.Ask(first.ns, "tcp", "192.0.2.2:7070")
	if err != nil || answer.Peer.Addr().String() != "192.0.2.1" {
		t.Errorf("out of an allocation: %+v, %v: want the node's address as the source", answer, err)
	}
	if repaired := n.repair(t); len(repaired) > 0 {
		t.Errorf("a second time: repaired %q", repaired)
	}
}

// repair is what the agent does of its own accord.
func (n *node) repair(t *testing.T) (repaired []string) {
	t.Helper()
	var err error
	n.ns.Do(func() { repaired, err = Repair(t.Context(), n.stateDir) })
	if err != nil {
		t.Fatal(err)
	}
	return repaired
}
