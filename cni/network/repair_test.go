// SPDX-License-Identifier: MPL-2.0

package network

import (
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/cni/network/hostport"
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

// A repair in the middle of a DEL puts nothing back that the DEL has taken away: nobody
// would remove it again, and the host port would lead to whoever gets the address next.
func TestRepairBesideDEL(t *testing.T) {
	for name, neighbours := range map[string]int{"of the bridge's last allocation": 0, "of one beside another": 1} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			for range neighbours {
				n.mapped(9090, 80).added(t, "stays")
			}
			for i := range test.Scale(60) {
				before := n.leftovers(t)
				a := n.allocation(t, "a")
				if _, err := n.mapped(8080, 80).add(a); err != nil {
					t.Fatal(err)
				}
				ended := make(chan error, 1)
				go func() { ended <- n.remove(a) }()
				var err error
				for removing := true; removing; {
					n.repair(t)
					select {
					case err = <-ended:
						removing = false
					default:
					}
				}
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(before, n.leftovers(t)); diff != "" {
					t.Fatalf("in round %d, on the node (-before +after):\n%s", i, diff)
				}
				if owners := n.portOwners(t); slices.Contains(owners, a.Key.ContainerID) {
					t.Fatalf("in round %d, host ports of %q", i, owners)
				}
			}
		})
	}
}

// What v0.1.0 left of an ended allocation ends; what is of a running one whose record is
// lost or cannot be read, or is nobody's, stays.
func TestRepairEndsHostPortsLeftBehind(t *testing.T) {
	n := newNode(t)
	a, _ := n.mapped(9090, 80).added(t, "stays")
	n.run(t, "nft", "add element inet weir hostports4_any { tcp . 8080 comment \"gone eth0\" : 10.77.0.9 . 80, tcp . 8081 : 10.77.0.9 . 80 }")
	record := n.network().records.Path(a.Key)
	whole, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(record, whole[:10], 0o600); err != nil {
		t.Fatal(err)
	}
	n.ns.Do(func() {
		if repaired, err := Repair(t.Context(), n.stateDir); err == nil || repaired != nil {
			t.Errorf("with a record that cannot be read: repaired %q, %v", repaired, err)
		}
	})
	if diff := cmp.Diff([]string{"", "gone", "stays"}, n.portOwners(t)); diff != "" {
		t.Errorf("owners with a record that cannot be read (-want +got):\n%s", diff)
	}
	if err := os.Remove(record); err != nil {
		t.Fatal(err)
	}
	want := []string{"host port tcp 0.0.0.0:8080 of gone-eth0, which has ended, removed"}
	if diff := cmp.Diff(want, n.repair(t)); diff != "" {
		t.Errorf("repaired (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"", "stays"}, n.portOwners(t)); diff != "" {
		t.Errorf("owners (-want +got):\n%s", diff)
	}
	if repaired := n.repair(t); repaired != nil {
		t.Errorf("a second time: repaired %q", repaired)
	}
}

// portOwners are the IDs of those who hold host ports in the kernel.
func (n *node) portOwners(t *testing.T) (owners []string) {
	t.Helper()
	n.ns.Do(func() {
		list, err := hostport.HostPorts()
		if err != nil {
			t.Fatal(err)
		}
		for _, port := range list {
			owners = append(owners, port.Key.ContainerID)
		}
	})
	slices.Sort(owners)
	return slices.Compact(owners)
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
