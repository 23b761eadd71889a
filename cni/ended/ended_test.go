// SPDX-License-Identifier: MPL-2.0

package ended

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	test.Main(m, map[string]func(args []string) error{threadInsideFunc: stayInsideByThread})
}

const allocationID = "0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01"

var key = workload.AttachmentID{ContainerID: allocationID, IfName: "eth0"}

// node is a node of its own, whose plugins are real: libcni makes the networks
// that deploy has conflists for, as Nomad does.
type node struct {
	Node
	t       *testing.T
	host    *test.NetNS
	alloc   *test.NetNS
	leases  string
	network string
}

func newNode(t *testing.T, network string) *node {
	t.Helper()
	test.Need(t, test.Root, test.CgroupV2, test.BPF, test.Tool("go"), test.Tool("iptables"), test.Tool("nft"))
	dir := t.TempDir()
	build := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(dir, "weir"), "../../cmd/weir-cni")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	n := &node{
		Node: Node{
			Paths:    store.Paths{PinDir: filepath.Join(test.BPFFS(t), "weir"), StateDir: t.TempDir()},
			CacheDir: t.TempDir(), NetNSDir: t.TempDir(), CNIPath: dir + ":" + test.CNIPath(t),
		},
		t: t, host: test.NewNetNS(t), alloc: test.NewBareNetNS(t), leases: t.TempDir(), network: network,
	}
	t.Cleanup(func() {
		if _, err := redirect.New(n.Paths).Unload(); err != nil {
			t.Errorf("unload: %v", err)
		}
	})
	n.add(allocationID, n.alloc)
	return n
}

// add is Nomad's ADD of a transparent allocation with a static host port.
func (n *node) add(id string, alloc *test.NetNS) {
	n.t.Helper()
	content, err := os.ReadFile("../../deploy/" + n.network + ".conflist")
	if err != nil {
		n.t.Fatal(err)
	}
	for _, leases := range []string{"/var/run/cni", "/run/weir/leases"} {
		content = bytes.ReplaceAll(content, []byte(`"`+leases+`"`), []byte(`"`+n.leases+`"`))
	}
	list, err := libcni.ConfListFromBytes(content)
	if err != nil {
		n.t.Fatal(err)
	}
	runtime := &libcni.RuntimeConf{
		ContainerID: id, NetNS: alloc.Path, IfName: "eth0",
		Args: [][2]string{
			{"IgnoreUnknown", "true"}, {"NOMAD_ALLOC_ID", id}, {"NOMAD_JOB_ID", "demo"}, {"NOMAD_GROUP_NAME", "web"},
			{"CONSUL_IPTABLES_CONFIG", `{"ProxyUserID":"101","ProxyInboundPort":20000,"ProxyOutboundPort":15001}`},
		},
		CapabilityArgs: map[string]any{"portMappings": []map[string]any{{"hostPort": 18080, "containerPort": 8080, "protocol": "tcp"}}},
	}
	n.host.Do(func() { _, err = n.library().AddNetworkList(n.t.Context(), list, runtime) })
	if err != nil {
		n.t.Fatal(err)
	}
}

// finds wants the allocation listed in this state, or not at all.
func (n *node) finds(state State) (found Attachment) {
	n.t.Helper()
	list, err := n.Find()
	if err != nil {
		n.t.Fatal(err)
	}
	want := []string{}
	if state != "" {
		want = append(want, fmt.Sprintf("%s %s demo/web %s %s", key, n.network, n.alloc.Path, state))
	}
	got := []string{}
	for _, a := range list {
		found = a
		got = append(got, fmt.Sprintf("%s %s %s/%s %s %s", a.Key, a.Network, a.Job.ID, a.Job.Group, a.NetNS, a.State))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		n.t.Fatalf("found (-want +got):\n%s", diff)
	}
	return found
}

func (n *node) remove(a Attachment) (err error) {
	n.host.Do(func() { err = n.Remove(n.t.Context(), a) })
	return err
}

// left names all that the node has of the allocation.
func (n *node) left() (list []string) {
	n.t.Helper()
	for _, pattern := range []string{
		n.CacheDir + "/results/*", n.Paths.StateDir + "/networks/*", n.Paths.StateDir + "/workloads/*", n.Paths.PinDir + "/lookups/*",
		n.leases + "/*/10.*", n.leases + "/*/172.*", n.NetNSDir + "/*",
	} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			n.t.Fatal(err)
		}
		list = append(list, files...)
	}
	n.host.Do(func() {
		links, err := netlink.LinkList()
		if err != nil {
			n.t.Fatal(err)
		}
		for _, link := range links {
			if link.Type() == "veth" {
				list = append(list, "device "+link.Attrs().Name)
			}
		}
		rules, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
		if err != nil {
			n.t.Fatalf("list rules: %v: %s", err, rules)
		}
		for line := range strings.Lines(string(rules)) {
			if strings.Contains(line, allocationID) || strings.Contains(line, "18080") {
				list = append(list, strings.TrimSpace(line))
			}
		}
	})
	return list
}

// A task runs on in the namespace of an allocation, whatever becomes of the path.
func TestAllocationThatRunsIsNeverFound(t *testing.T) {
	for _, network := range []string{"weir", "weir-chained"} {
		t.Run(network, func(t *testing.T) {
			n := newNode(t, network)
			listed := n.finds(Empty)
			task := test.EchoProcess(t, test.Spec{NetNS: n.alloc}, "tcp4", "0.0.0.0:8080")
			n.finds("")
			if err := n.remove(listed); !errors.Is(err, ErrInUse) {
				t.Errorf("remove of a running allocation = %v, want ErrInUse", err)
			}
			// Docker made another namespace under the same ID, or somebody unmounted it.
			n.alloc.End()
			n.finds("")
			// What knows the namespace's cookie is lost too.
			for _, records := range []string{"networks", "workloads"} {
				if err := os.RemoveAll(filepath.Join(n.Paths.StateDir, records)); err != nil {
					t.Fatal(err)
				}
			}
			n.finds("")
			if err := n.remove(listed); !errors.Is(err, ErrInUse) {
				t.Errorf("remove of a running allocation = %v, want ErrInUse", err)
			}
			if len(n.left()) == 0 {
				t.Error("its network is gone")
			}
			task.Stop()
			n.finds(Gone)
		})
	}
}

func TestRemoveWhereNoNamespaceIsLeft(t *testing.T) {
	for _, network := range []string{"weir", "weir-chained"} {
		t.Run(network, func(t *testing.T) {
			n := newNode(t, network)
			n.alloc.End()
			listed := n.finds(Gone)
			if err := n.remove(listed); err != nil {
				t.Fatal(err)
			}
			n.finds("")
			// Behind the reference plugin bridge a rule stays, as at any DEL that
			// comes after the namespace's end.
			for _, what := range n.left() {
				if network == "weir" || strings.Contains(what, "18080") || !strings.Contains(what, "jump CNI-") {
					t.Errorf("left: %s", what)
				}
			}
			if err := n.remove(listed); err != nil {
				t.Errorf("remove it again: %v", err)
			}
		})
	}
}

func TestRemoveOfAnEmptyNamespace(t *testing.T) {
	for _, network := range []string{"weir", "weir-chained"} {
		t.Run(network, func(t *testing.T) {
			n := newNode(t, network)
			mounted := filepath.Join(n.NetNSDir, allocationID)
			if err := os.WriteFile(mounted, nil, 0o444); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount(n.alloc.Path, mounted, "", unix.MS_BIND, ""); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Unmount(mounted, unix.MNT_DETACH) }) // it is gone where the test passes
			listed := n.finds(Empty)
			if err := n.remove(listed); err != nil {
				t.Fatal(err)
			}
			n.finds("")
			if left := n.left(); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
		})
	}
}

// A mount that this process does not see may be there for others: the file tells.
func TestNamespaceThatIsMountedElsewhere(t *testing.T) {
	n := newNode(t, "weir")
	n.alloc.End()
	file := filepath.Join(n.NetNSDir, allocationID)
	if err := os.WriteFile(file, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	if err := n.remove(n.finds(Empty)); err != nil {
		t.Fatal(err)
	}
	if left := n.left(); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// What was listed when no namespace was there is not taken away when one came.
func TestRemoveLooksAgain(t *testing.T) {
	n := newNode(t, "weir")
	listed := n.finds(Empty)
	listed.State = Gone
	if err := n.remove(listed); !errors.Is(err, ErrInUse) {
		t.Errorf("remove = %v, want ErrInUse", err)
	}
	n.finds(Empty)
}

// Where libcni forgot it and no plugin is there to be called, records are enough.
func TestRemoveByRecordsAlone(t *testing.T) {
	n := newNode(t, "weir")
	if err := os.RemoveAll(filepath.Join(n.CacheDir, "results")); err != nil {
		t.Fatal(err)
	}
	n.alloc.End()
	if err := n.remove(n.finds(Gone)); err != nil {
		t.Fatal(err)
	}
	if left := n.left(); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// After a power cut libcni's result is all that is left, and another allocation may
// have got the same address.
func TestRemoveAfterAReboot(t *testing.T) {
	for _, network := range []string{"weir", "weir-chained"} {
		t.Run(network, func(t *testing.T) {
			n := newNode(t, network)
			addresses, err := host.Addresses(n.alloc.Path)
			if err != nil {
				t.Fatal(err)
			}
			n.alloc.End()
			n.host.End()
			n.host = test.NewNetNS(t)
			if _, err := redirect.New(n.Paths).Unload(); err != nil {
				t.Fatal(err)
			}
			for _, dir := range []string{n.Paths.StateDir, n.leases} {
				if err := os.RemoveAll(dir); err != nil {
					t.Fatal(err)
				}
			}
			heir := test.NewNetNS(t)
			test.Veth(t, test.VethEnd{NetNS: heir, Name: "eth0", Addrs: []netip.Prefix{netip.PrefixFrom(addresses[0], addresses[0].BitLen())}},
				test.VethEnd{NetNS: n.host, Name: "heir"})
			test.EchoProcess(t, test.Spec{NetNS: heir}, "tcp4", "0.0.0.0:8080")
			if err := n.remove(n.finds(Gone)); err != nil {
				t.Fatal(err)
			}
			if left := n.left(); len(left) != 1 || left[0] != "device heir" {
				t.Errorf("left: %q, want the other allocation's device", left)
			}
		})
	}
}

// A namespace of Nomad's alone is one that it did not take away.
func TestRemoveOfANamespaceAlone(t *testing.T) {
	test.Need(t, test.Root)
	n := Node{Paths: store.Paths{StateDir: t.TempDir()}, CacheDir: t.TempDir(), NetNSDir: t.TempDir()}
	mounted := filepath.Join(n.NetNSDir, allocationID)
	for _, name := range []string{mounted, filepath.Join(n.NetNSDir, "somebody-elses")} {
		ns := test.NewNetNS(t)
		if err := os.WriteFile(name, nil, 0o444); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(ns.Path, name, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(name, unix.MNT_DETACH) }) // gone where the test passes
	}
	list, err := n.Find()
	if err != nil || len(list) != 1 || list[0].NetNS != mounted || list[0].State != Empty {
		t.Fatalf("found %+v, %v; want the allocation's namespace", list, err)
	}
	if err := n.Remove(t.Context(), list[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(mounted); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the namespace is still there: %v", err)
	}
}

// What cannot be read is told, and nothing is guessed about it.
func TestUnreadableResult(t *testing.T) {
	n := newNode(t, "weir")
	n.alloc.End()
	file := filepath.Join(n.CacheDir, "results", "weir-"+key.String())
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	broken := bytes.Replace(content, []byte(`"ips":[`), []byte(`"ips":["?",`), 1)
	if bytes.Equal(broken, content) {
		t.Fatalf("the result has no addresses: %s", content)
	}
	if err := os.WriteFile(file, broken, 0o600); err != nil {
		t.Fatal(err)
	}
	if list, err := n.Find(); err == nil || len(list) > 0 {
		t.Errorf("found %+v, %v; want an error alone", list, err)
	}
}
