// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test"
)

// Join adds a machine to the cluster: a client of the servers of n, on the same
// network, whose name is "node-2" and so on. Jobs that are run on n can be placed
// there, and an [Alloc] is worked on where it runs.
func (n *Node) Join(options Options) *Node {
	n.tb.Helper()
	m := newNode(n.tb, options, n.parts, n.datacenter)
	m.leader = n
	number := len(n.members) + 1
	m.machine.join(n.machine, fmt.Sprintf("node-%d", number), number+1)
	m.run()
	n.members[m.machine.name] = m
	return m
}

// join puts a machine that is to be started on the network of another, at a number there.
func (m *machine) join(other *machine, name string, number int) {
	m.name, m.joined = name, other
	m.address, m.address6 = fmt.Sprintf("10.99.0.%d", number), fmt.Sprintf("fd00:99::%d", number)
}

// Name is the node's, for Nomad, Consul and the kernel.
func (n *Node) Name() string { return n.machine.name }

// member is the node of the cluster with that name, for the test of n.
func (n *Node) member(name string) *Node {
	m := n.members[name]
	if m == nil || m.machine == n.machine {
		return n
	}
	other := *m
	other.tb = n.tb
	return &other
}

// bridge connects another machine to the network that the machine shares with its
// neighbour: the neighbour becomes the switch, under its address.
func (m *machine) bridge(tb testing.TB, other *machine) {
	tb.Helper()
	port := other.port()
	test.Veth(tb,
		test.VethEnd{NetNS: m.neighbour, Name: port},
		test.VethEnd{NetNS: other.net, Addrs: prefixes(other.address+"/24", other.address6+"/64")})
	lines := []string{"link set " + port + " master br0"}
	if exec.Command("nsenter", "--net="+m.neighbour.Path, "--", "ip", "link", "show", "br0").Run() != nil {
		lines = []string{
			"link add br0 type bridge", "address flush dev eth0", "link set eth0 master br0",
			"address add " + NeighbourAddress + "/24 dev br0", "address add fd00:99::1/64 dev br0 nodad", "link set br0 up", lines[0],
		}
	}
	for _, line := range lines {
		ip(tb, m.neighbour, line)
	}
	ip(tb, other.net, "route add default via "+NeighbourAddress)
}

// port is the name of the bridge's port that the machine is plugged into.
func (m *machine) port() string { return strings.ReplaceAll(m.name, "-", "") }

// unplug removes the port at once: the kernel takes its time with a namespace that
// nothing runs in any more, and the next boot plugs the machine in again.
func (m *machine) unplug(tb testing.TB) {
	tb.Helper()
	if exec.Command("nsenter", "--net="+m.neighbour.Path, "--", "ip", "link", "show", m.port()).Run() == nil {
		ip(tb, m.neighbour, "link delete "+m.port())
	}
}

// Isolate parts a node that has joined a cluster from all others, until [Node.Rejoin].
// What it runs goes on.
func (n *Node) Isolate() {
	n.tb.Helper()
	ip(n.tb, n.machine.neighbour, "link set "+n.machine.port()+" down")
}

func (n *Node) Rejoin() {
	n.tb.Helper()
	ip(n.tb, n.machine.neighbour, "link set "+n.machine.port()+" up")
}

func ip(tb testing.TB, ns *test.NetNS, line string) {
	tb.Helper()
	if out, err := exec.Command("nsenter", append([]string{"--net=" + ns.Path, "--", "ip"}, strings.Fields(line)...)...).CombinedOutput(); err != nil {
		tb.Fatalf("ip %s: %v: %s", line, err, out)
	}
}
