// SPDX-License-Identifier: MPL-2.0

package network

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/cni/network/delegate"
	"github.com/weirmesh/weir/redirect/workload"

	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/test"
)

func TestMain(m *testing.M) { test.Main(m, nil) }

const (
	bridge  = "weir0"
	subnet4 = "10.77.0.0/24"
	subnet6 = "fd77:1::/64"
)

// node is a node of its own: a namespace in the place of the host's, joined to
// one that stands for the rest of the world.
type node struct {
	ns, outside *test.NetNS
	stateDir    string
	path        string // CNI_PATH
	config      attachment.Config
}

func newNode(t *testing.T) *node {
	t.Helper()
	test.Need(t, test.Root, test.Tool("nft"))
	dir := t.TempDir()
	n := &node{ns: test.NewNetNS(t), outside: test.NewNetNS(t), stateDir: filepath.Join(dir, "state"), path: test.CNIPath(t)}
	test.Veth(t,
		test.VethEnd{NetNS: n.ns, Name: "uplink", DefaultRoute: true, Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")}},
		test.VethEnd{NetNS: n.outside, Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.2/24"), netip.MustParsePrefix("2001:db8::2/64")}})
	n.config = attachment.Config{
		Name: "weir", CNIVersion: "1.0.0", Bridge: bridge, Gateway: true, Masquerade: true, Hairpin: true,
		IPAM: delegate.HostLocal, LeaseDir: filepath.Join(dir, "leases"),
	}
	n.ranges(subnet4, subnet6)
	return n
}

// ranges sets what host-local gives addresses from.
func (n *node) ranges(subnets ...string) {
	var ranges [][]map[string]string
	for _, subnet := range subnets {
		ranges = append(ranges, []map[string]string{{"subnet": subnet}})
	}
	n.ipam(map[string]any{"type": delegate.HostLocal, "dataDir": n.config.LeaseDir, "ranges": ranges})
}

func (n *node) ipam(ipam map[string]any) {
	n.config.IPAM = ipam["type"].(string)
	n.config.Delegate, _ = json.Marshal(map[string]any{"cniVersion": n.config.CNIVersion, "name": n.config.Name, "type": "weir", "ipam": ipam})
}

func (n *node) network() *Network { return New(n.config, n.stateDir) }

// allocation is a namespace and its place in the node's network.
type allocation struct {
	attachment.Attachment
	ns *test.NetNS
}

func (n *node) allocation(t *testing.T, id string) *allocation {
	t.Helper()
	ns := test.NewBareNetNS(t)
	return &allocation{attachment.Attachment{Key: workload.AttachmentID{ContainerID: id, IfName: "eth0"}, NetNS: ns.Path, Path: n.path}, ns}
}

// added is an allocation whose network is built.
func (n *node) added(t *testing.T, id string) (*allocation, *current.Result) {
	t.Helper()
	a := n.allocation(t, id)
	result, err := n.add(a)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.remove(a); err != nil {
			t.Errorf("remove %s: %v", id, err)
		}
	})
	return a, result
}

func (n *node) add(a *allocation) (result *current.Result, err error) {
	n.ns.Do(func() { result, _, err = n.network().Add(a.Attachment) })
	return result, err
}

func (n *node) remove(a *allocation) (err error) {
	n.ns.Do(func() { err = n.network().Remove(a.Attachment) })
	return err
}

func (n *node) check(a *allocation, previous *current.Result) (repairs []string, err error) {
	n.ns.Do(func() { repairs, err = n.network().Check(a.Attachment, previous) })
	return repairs, err
}

// run runs a command in the node's namespace.
func (n *node) run(t *testing.T, name string, args ...string) string {
	t.Helper()
	var out []byte
	var err error
	n.ns.Do(func() { out, err = exec.Command(name, args...).CombinedOutput() })
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// leftovers is what attachments leave on a node, one thing a line: devices,
// rules, leases, records. The bridge itself stays and is none.
func (n *node) leftovers(t *testing.T) (list []string) {
	t.Helper()
	n.ns.Do(func() {
		links, err := netlink.LinkList()
		if err != nil {
			t.Fatal(err)
		}
		for _, link := range links {
			if !slices.Contains([]string{"lo", "uplink", bridge}, link.Attrs().Name) {
				list = append(list, "device "+link.Attrs().Name)
			}
		}
	})
	for line := range strings.Lines(n.run(t, "nft", "-s", "list", "ruleset")) {
		if strings.Contains(line, "weir") || strings.Contains(line, "dport") {
			list = append(list, "rule "+strings.TrimSpace(line))
		}
	}
	for _, pattern := range []string{filepath.Join(n.config.LeaseDir, "*", "*"), filepath.Join(n.stateDir, "networks", "*")} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if base := filepath.Base(file); base != "lock" && !strings.HasPrefix(base, "last_reserved_ip") {
				list = append(list, "file "+file)
			}
		}
	}
	return list
}

func (n *node) wantNothingLeft(t *testing.T) {
	t.Helper()
	if left := n.leftovers(t); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}

// wantSame runs action and checks that the node has afterwards what it had before.
func (n *node) wantSame(t *testing.T, action func()) {
	t.Helper()
	before := n.leftovers(t)
	action()
	if diff := cmp.Diff(before, n.leftovers(t)); diff != "" {
		t.Errorf("on the node (-before +after):\n%s", diff)
	}
}

// addresses are those of a result, IPv4 first.
func addresses(result *current.Result) (list []string) {
	for _, ip := range result.IPs {
		list = append(list, ip.Address.IP.String())
	}
	return list
}

// fakeIPAM is an IPAM plugin that prints what it is told and keeps a list of
// the commands that it was called with.
func (n *node) fakeIPAM(t *testing.T, result string) (calls func() string) {
	t.Helper()
	dir := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\necho -n \"$CNI_COMMAND \" >>%s/calls\ncat >/dev/null\n[ $CNI_COMMAND != ADD ] || echo '%s'\n", dir, result)
	if err := os.WriteFile(filepath.Join(dir, "fake-ipam"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	n.path = dir + ":" + n.path
	n.ipam(map[string]any{"type": "fake-ipam"})
	return func() string {
		data, _ := os.ReadFile(filepath.Join(dir, "calls"))
		return string(data)
	}
}

// runHere runs a command in the calling thread's namespace.
func runHere(t *testing.T, name string, args ...string) {
	t.Helper()
	if err := tryHere(name, args...); err != nil {
		t.Fatal(err)
	}
}

func tryHere(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}
