// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/weirmesh/weir/cni"
	"github.com/weirmesh/weir/test"
)

// networkNode is a node on which the plugin builds the networks itself: all of
// it happens in a namespace that stands for the host's.
type networkNode struct {
	*cniNode
	host   *test.NetNS
	path   string // CNI_PATH
	leases string
}

func newNetworkNode(t *testing.T) *networkNode {
	t.Helper()
	n := &networkNode{cniNode: newCNINode(t).loaded(t), host: test.NewNetNS(t), path: test.CNIPath(t)}
	n.leases = filepath.Join(n.paths.StateDir, "leases", "weir")
	return n
}

// call runs the plugin on the host, for an allocation in the namespace.
func (n *networkNode) call(t *testing.T, command, id, netns, args string, stdin map[string]string) (answer cniAnswer) {
	t.Helper()
	request := cniRequest{Env: map[string]string{
		"CNI_COMMAND": command, "CNI_CONTAINERID": id, "CNI_NETNS": netns, "CNI_IFNAME": "eth0", "CNI_ARGS": args,
		"CNI_PATH": n.path, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
	}}.configured(map[string]string{"cniVersion": `"1.0.0"`, "name": `"weir"`, "type": `"weir"`}).configured(stdin)
	n.host.Do(func() { answer = n.run(t, request) })
	return answer
}

// wantEmpty checks that no device, lease, record or workload is left.
func (n *networkNode) wantEmpty(t *testing.T) {
	t.Helper()
	n.host.Do(func() {
		links, err := netlink.LinkList()
		if err != nil {
			t.Fatal(err)
		}
		for _, link := range links {
			if name := link.Attrs().Name; name != "lo" && name != cni.DefaultBridge {
				t.Errorf("device %s is left", name)
			}
		}
	})
	for _, pattern := range []string{filepath.Join(n.paths.StateDir, "networks", "*"), filepath.Join(n.leases, "172.*")} {
		if left, err := filepath.Glob(pattern); err != nil || len(left) > 0 {
			t.Errorf("left %q, %v", left, err)
		}
	}
	if left := n.workloads(t); len(left) > 0 {
		t.Errorf("workloads left: %v", left)
	}
}

// What Nomad does with one allocation of network { mode = "cni/weir" }: the
// plugin builds the namespace by itself, and redirects it.
func TestNetworkOfThePluginsOwn(t *testing.T) {
	n := newNetworkNode(t)
	add := recordedFor(t, "tproxy-plain", "")
	id, args := add.id(), add.Env["CNI_ARGS"]
	a := &cniAllocation{node: n.cniNode, ns: test.NewBareNetNS(t), outside: n.host, id: id}
	ports := map[string]string{"runtimeConfig": `{"portMappings":[{"hostPort":8080,"containerPort":8080,"protocol":"tcp"}]}`}

	first := n.call(t, "ADD", id, a.ns.Path, args, ports)
	if first.exit != 0 {
		t.Fatalf("ADD: %+v", first)
	}
	for range 2 {
		wantAnswer(t, n.call(t, "ADD", id, a.ns.Path, args, ports), first.stdout)
	}
	var result struct {
		Interfaces []struct{ Name, Sandbox string }
		IPs        []struct{ Address string }
	}
	if err := json.Unmarshal([]byte(first.stdout), &result); err != nil || len(result.IPs) != 1 {
		t.Fatalf("result %s: %v", first.stdout, err)
	}
	// Nomad looks for the interface of that name that is in a sandbox.
	if i := slices.IndexFunc(result.Interfaces, func(i struct{ Name, Sandbox string }) bool { return i.Name == "eth0" }); i < 0 || result.Interfaces[i].Sandbox != a.ns.Path {
		t.Errorf("interfaces %+v: want eth0 in %s", result.Interfaces, a.ns.Path)
	}
	a.addr = netip.MustParsePrefix(result.IPs[0].Address).Addr()
	a.wantRedirected(t, "23435")

	last := map[string]string{"prevResult": first.stdout, "runtimeConfig": ports["runtimeConfig"]}
	wantSilence(t, n.call(t, "CHECK", id, a.ns.Path, args, last))
	removeFilesIn(t, n.paths.PinDir)
	removeFilesIn(t, filepath.Join(n.paths.StateDir, "workloads"))
	removeFilesIn(t, filepath.Join(n.paths.StateDir, "networks"))
	repaired := n.call(t, "CHECK", id, a.ns.Path, args, last)
	wantSilence(t, repaired)
	if !strings.Contains(repaired.stderr, "repaired: the record of the network") || !strings.Contains(repaired.stderr, "redirected anew") {
		t.Errorf("stderr %q: want to hear of both", repaired.stderr)
	}
	a.wantRedirected(t, "23435")

	empty := test.NewBareNetNS(t)
	wantRefusal(t, n.call(t, "CHECK", id, empty.Path, args, last), 8, id)
	// As Nomad does then; but tasks that run in the old one keep their network.
	wantRefusal(t, n.call(t, "ADD", id, empty.Path, args, ports), 11, id)
	a.wantRedirected(t, "23435")

	// Nomad's DEL has no CNI_ARGS, and after a failed ADD no previous result.
	wantSilence(t, n.call(t, "DEL", id, empty.Path, "", last))
	n.wantEmpty(t)
	for _, netns := range []string{empty.Path, "/nowhere", ""} {
		wantSilence(t, n.call(t, "DEL", id, netns, "", map[string]string{"ipam": `{"type":"no-such-ipam"}`}))
	}
}

func TestOwnNetworkInEveryVersion(t *testing.T) {
	n := newNetworkNode(t)
	for _, version := range cni.Versions().SupportedVersions() {
		ns := test.NewBareNetNS(t)
		quoted := map[string]string{"cniVersion": fmt.Sprintf("%q", version)}
		add := n.call(t, "ADD", "a", ns.Path, "", quoted)
		if add.exit != 0 || !strings.Contains(add.stdout, quoted["cniVersion"]) || !strings.Contains(add.stdout, "172.26.128.") {
			t.Errorf("ADD of %s: %+v", version, add)
		}
		if version != "0.3.1" {
			wantSilence(t, n.call(t, "CHECK", "a", ns.Path, "", map[string]string{"cniVersion": quoted["cniVersion"], "prevResult": add.stdout}))
		}
		if version == "1.1.0" {
			status := map[string]string{"cniVersion": quoted["cniVersion"], "bridge": `"weir0"`}
			wantSilence(t, n.call(t, "STATUS", "", "", "", status))
			status["ipam"] = `{"type":"no-such-ipam"}`
			wantRefusal(t, n.call(t, "STATUS", "", "", "", status), 50, "no-such-ipam")
			wantSilence(t, n.call(t, "GC", "", "", "", map[string]string{"cniVersion": quoted["cniVersion"], "cni.dev/valid-attachments": "[]"}))
			n.wantEmpty(t)
		}
		wantSilence(t, n.call(t, "DEL", "a", ns.Path, "", quoted))
		n.wantEmpty(t)
	}
}

// The steps after the network fail: it is taken back with the rest.
func TestNetworkIsTakenBackWhenTheRedirectFails(t *testing.T) {
	n := newNetworkNode(t)
	add := recordedFor(t, "tproxy-plain", "")
	ns := test.NewBareNetNS(t)
	broken := *n
	node := *n.cniNode
	node.paths.PinDir = filepath.Join(t.TempDir(), "weir") // which is in no bpffs
	broken.cniNode = &node
	for range 3 {
		wantRefusal(t, broken.call(t, "ADD", add.id(), ns.Path, add.Env["CNI_ARGS"], nil), cni.CodeDatapath, add.id(), "bpffs")
		n.wantEmpty(t)
	}
	if answer := n.call(t, "ADD", add.id(), ns.Path, add.Env["CNI_ARGS"], nil); answer.exit != 0 {
		t.Errorf("ADD after the cause is gone: %+v", answer)
	}
	wantSilence(t, n.call(t, "DEL", add.id(), ns.Path, "", nil))
	n.wantEmpty(t)
}

// Nomad calls the plugin for one allocation at a time; nobody else has to.
func TestManyOwnNetworksAtOnce(t *testing.T) {
	n := newNetworkNode(t)
	add := recordedFor(t, "tproxy-plain", "")
	namespaces := make([]*test.NetNS, test.Scale(50))
	for i := range namespaces {
		namespaces[i] = test.NewBareNetNS(t)
	}
	each := func(command, args string) {
		var wg sync.WaitGroup
		for i, ns := range namespaces {
			wg.Go(func() {
				id := fmt.Sprintf("many-%d", i)
				if answer := n.call(t, command, id, ns.Path, strings.ReplaceAll(args, add.id(), id), nil); answer.exit != 0 {
					t.Errorf("%s %d: %+v", command, i, answer)
				}
			})
		}
		wg.Wait()
	}
	each("ADD", add.Env["CNI_ARGS"])
	if got := len(n.workloads(t)); got != len(namespaces) {
		t.Errorf("%d workloads: want %d", got, len(namespaces))
	}
	each("DEL", "")
	n.wantEmpty(t)
}
