// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/test"
)

// cniRequest is one call of a plugin, as it was recorded from Nomad 1.11.1.
type cniRequest struct {
	Command      string                     `json:"command"`
	Env          map[string]string          `json:"env"`
	Stdin        map[string]json.RawMessage `json:"stdin"`
	ConsulStdout json.RawMessage            `json:"consul_cni_stdout"` // the answer of consul-cni
}

// with is a copy in which keys of the environment have other values.
func (r cniRequest) with(env map[string]string) cniRequest {
	changed := map[string]string{}
	maps.Copy(changed, r.Env)
	maps.Copy(changed, env)
	r.Env, r.Command = changed, changed["CNI_COMMAND"]
	return r
}

// configured is a copy in which keys on stdin have other values; "" takes one away.
func (r cniRequest) configured(stdin map[string]string) cniRequest {
	changed := map[string]json.RawMessage{}
	maps.Copy(changed, r.Stdin)
	for key, value := range stdin {
		changed[key] = json.RawMessage(value)
		if value == "" {
			delete(changed, key)
		}
	}
	r.Stdin = changed
	return r
}

func (r cniRequest) id() string { return r.Env["CNI_CONTAINERID"] }

// cniAnswer is what a call of the plugin gave.
type cniAnswer struct {
	stdout, stderr string
	exit           int
}

// cniNode is a node of its own on this machine: the plugin under Consul's name,
// and state that no other node sees.
type cniNode struct {
	plugin string
	paths  store.Paths
	cgroup *test.Cgroup
	idle   []string // what a node has where nothing is redirected
}

// newCNINode builds the plugin and makes a node on which nothing is loaded.
func newCNINode(t *testing.T) *cniNode {
	t.Helper()
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	dir := t.TempDir()
	buildPlugin(t, filepath.Join(dir, "consul-cni"))
	cgroup := test.NewCgroup(t)
	n := &cniNode{
		plugin: filepath.Join(dir, "consul-cni"),
		cgroup: cgroup,
		paths: store.Paths{
			PinDir: filepath.Join(test.BPFFS(t), "weir"), StateDir: filepath.Join(dir, "state"), CgroupRoot: cgroup.Path,
		},
	}
	t.Cleanup(func() {
		if _, err := redirect.New(n.paths).Unload(); err != nil {
			t.Errorf("unload: %v", err)
		}
	})
	return n
}

// buildPlugin puts the plugin at the path. Where there is no Go, in the guests of test/vm,
// WEIR_TEST_BIN has the plugin built.
func buildPlugin(t *testing.T, path string) {
	t.Helper()
	if built := os.Getenv("WEIR_TEST_BIN"); built != "" {
		if err := os.Symlink(filepath.Join(built, "weir-cni"), path); err != nil {
			t.Fatalf("take built plugin: %v", err)
		}
		return
	}
	build := exec.Command("go", "build", "-trimpath", "-o", path, "github.com/weirmesh/weir/cmd/weir-cni")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build plugin: %v\n%s", err, out)
	}
}

// loaded is the node with the data path loaded before the first ADD.
func (n *cniNode) loaded(t *testing.T) *cniNode {
	t.Helper()
	if _, err := redirect.New(n.paths).Load(); err != nil {
		t.Fatalf("load: %v", err)
	}
	n.idle = n.files(t)
	return n
}

// run calls the plugin as a runtime does. Any goroutine may call it.
func (n *cniNode) run(t *testing.T, request cniRequest) cniAnswer {
	t.Helper()
	stdin, err := json.Marshal(request.Stdin)
	if err != nil {
		t.Errorf("write configuration: %v", err)
	}
	cmd := exec.Command(n.plugin)
	cmd.Env = []string{"WEIR_PIN_DIR=" + n.paths.PinDir, "WEIR_STATE_DIR=" + n.paths.StateDir, "WEIR_CGROUP_ROOT=" + n.paths.CgroupRoot}
	for key, value := range request.Env {
		cmd.Env = append(cmd.Env, key+"="+value)
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if ended := new(exec.ExitError); !errors.As(err, &ended) {
			t.Errorf("run plugin: %v", err)
			return cniAnswer{exit: -1}
		}
	}
	return cniAnswer{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// files lists what the node has: pins and state.
func (n *cniNode) files(t *testing.T) []string {
	t.Helper()
	var list []string
	for _, root := range []string{n.paths.PinDir, n.paths.StateDir} {
		err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil && !entry.IsDir() {
				list = append(list, path)
			}
			return err
		})
		if err != nil {
			t.Fatalf("list %s: %v", root, err)
		}
	}
	return list
}

// wantIdle checks that nothing of any workload is left on the node.
func (n *cniNode) wantIdle(t *testing.T) {
	t.Helper()
	if diff := cmp.Diff(n.idle, n.files(t)); diff != "" {
		t.Errorf("pins and state (-idle +now):\n%s", diff)
	}
	if left := n.workloads(t); len(left) != 0 {
		t.Errorf("workloads left: %v", left)
	}
}

// workloads are the namespaces on record, by container ID.
func (n *cniNode) workloads(t *testing.T) map[string]string {
	t.Helper()
	list, err := redirect.New(n.paths).Workloads()
	if err != nil {
		t.Fatalf("list workloads: %v", err)
	}
	netns := map[string]string{}
	for _, workload := range list {
		netns[workload.ID] = workload.NetNS
	}
	return netns
}

// recordings are the recorded requests by scenario.
func recordings(t *testing.T) map[string][]cniRequest {
	t.Helper()
	data, err := os.ReadFile("../../cni/testdata/nomad-1.11.1-cni.json")
	if err != nil {
		t.Fatal(err)
	}
	// Whoever recorded it asked for mode x, to see that a job's arguments arrive.
	data = bytes.ReplaceAll(data, []byte("weir.mode=x"), []byte("weir.mode=transparent"))
	var all map[string][]cniRequest
	if err := json.Unmarshal(data, &all); err != nil {
		t.Fatal(err)
	}
	return all
}

// recordedFor is the first request of a scenario for the container ID; of any
// where that is empty.
func recordedFor(t *testing.T, scenario, id string) cniRequest {
	t.Helper()
	for _, request := range recordings(t)[scenario] {
		if id == "" || request.id() == id {
			return request
		}
	}
	t.Fatalf("no request for %q in scenario %s", id, scenario)
	return cniRequest{}
}

// cniAllocation is a namespace that stands for the one a request was recorded for.
type cniAllocation struct {
	node        *cniNode
	ns, outside *test.NetNS
	id          string
	recorded    string // the namespace's path in the requests
	addr        netip.Addr
	gateway     netip.Addr // of the outside
	routes      []string   // before it was redirected
	proxies     map[string]*test.ServerProcess
	client      *test.Client
}

// allocate makes the namespace that the plugins before ours would have made.
func (n *cniNode) allocate(t *testing.T, add cniRequest) *cniAllocation {
	t.Helper()
	var previous struct {
		IPs []struct{ Address, Gateway string }
	}
	if err := json.Unmarshal(add.Stdin["prevResult"], &previous); err != nil || len(previous.IPs) == 0 {
		t.Fatalf("prevResult %s: %v", add.Stdin["prevResult"], err)
	}
	addr := netip.MustParsePrefix(previous.IPs[0].Address)
	a := &cniAllocation{
		node: n, ns: test.NewNetNS(t), outside: test.NewNetNS(t),
		id: add.id(), recorded: add.Env["CNI_NETNS"], addr: addr.Addr(),
	}
	a.gateway = netip.MustParseAddr(previous.IPs[0].Gateway)
	gateway := netip.PrefixFrom(a.gateway, addr.Bits())
	test.Veth(t,
		test.VethEnd{NetNS: a.outside, Addrs: []netip.Prefix{gateway}},
		test.VethEnd{NetNS: a.ns, Addrs: []netip.Prefix{addr}, DefaultRoute: true})
	a.routes = localRoutes(t, a.ns)
	return a
}

// in puts the allocation's own namespace where the recorded one is named.
func (a *cniAllocation) in(text json.RawMessage) string {
	return strings.ReplaceAll(string(text), a.recorded, a.ns.Path)
}

// run calls the plugin for the allocation.
func (a *cniAllocation) run(t *testing.T, request cniRequest) cniAnswer {
	t.Helper()
	env := map[string]string{}
	for key, value := range request.Env {
		env[key] = a.in(json.RawMessage(value))
	}
	stdin := map[string]string{}
	for key, value := range request.Stdin {
		stdin[key] = a.in(value)
	}
	return a.node.run(t, request.with(env).configured(stdin))
}

// The node and the job of the recordings.
const (
	recordedUID      = 1101
	recordedOutbound = "127.0.0.1:15001"
)

// wantRedirected checks that what a task dials reaches the proxy with its origin
// intact, and that what comes from outside reaches the proxy too. The proxy is
// started once: afterwards its listeners are older than what ADD or CHECK made.
func (a *cniAllocation) wantRedirected(t *testing.T, inbound string) {
	t.Helper()
	if a.proxies == nil {
		proxy := test.Spec{NetNS: a.ns, Cgroup: a.node.cgroup.Child(t, filepath.Base(filepath.Dir(a.ns.Path))+"-proxy"), UID: recordedUID, GID: recordedUID}
		task := test.Spec{NetNS: a.ns, Cgroup: a.node.cgroup.Child(t, filepath.Base(filepath.Dir(a.ns.Path))+"-task"), UID: 1000, GID: 1000}
		a.proxies = map[string]*test.ServerProcess{
			"outbound": test.EchoProcess(t, proxy, "tcp4", recordedOutbound),
			"inbound":  test.EchoProcess(t, proxy, "tcp4", "0.0.0.0:"+inbound),
		}
		a.client = test.NewClient(t, task)
	}
	origin := netip.MustParseAddrPort("203.0.113.9:80")
	answer, err := a.client.Ask("tcp4", origin.String())
	if err != nil {
		t.Errorf("dial %s from inside: %v", origin, err)
	} else if answer.Server != a.proxies["outbound"].Name || answer.Origin != origin || answer.To != origin {
		t.Errorf("dial %s from inside: %+v: want the outbound listener and the origin", origin, answer)
	}
	service := netip.AddrPortFrom(a.addr, 8080)
	answer, err = test.Ask(a.outside, "tcp4", service.String())
	if err != nil {
		t.Errorf("dial %s from outside: %v", service, err)
	} else if answer.Server != a.proxies["inbound"].Name || answer.Local != service {
		t.Errorf("dial %s from outside: %+v: want the inbound listener and the local address intact", service, answer)
	}
}

// wantRoutesBack checks that the namespace has the routes that it had before it
// was redirected.
func (a *cniAllocation) wantRoutesBack(t *testing.T) {
	t.Helper()
	if diff := cmp.Diff(a.routes, localRoutes(t, a.ns)); diff != "" {
		t.Errorf("local routes (-before +now):\n%s", diff)
	}
}

// localRoutes lists the table in which the kernel looks for its own addresses.
// Link-local IPv6 comes and goes by itself and is left out.
func localRoutes(t *testing.T, ns *test.NetNS) []string {
	t.Helper()
	const tableLocal = 255
	var list []netlink.Route
	var err error
	ns.Do(func() {
		list, err = netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: tableLocal}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		t.Fatalf("list routes: %v", err)
	}
	var texts []string
	for _, route := range list {
		if route.Dst == nil || !route.Dst.IP.IsLinkLocalUnicast() && !route.Dst.IP.IsMulticast() {
			texts = append(texts, route.String())
		}
	}
	slices.Sort(texts)
	return texts
}

// removeFilesIn takes away every file below a directory, pins among them.
func removeFilesIn(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if err := os.RemoveAll(filepath.Join(dir, entry.Name())); err != nil {
			t.Fatal(err)
		}
	}
}

// wantAnswer checks that the plugin succeeded and printed the JSON and no more.
func wantAnswer(t *testing.T, got cniAnswer, want string) {
	t.Helper()
	var printed, wanted any
	if err := json.Unmarshal([]byte(got.stdout), &printed); err != nil || got.exit != 0 {
		t.Fatalf("exit %d, stdout %s, stderr %s: %v", got.exit, got.stdout, got.stderr, err)
	}
	if err := json.Unmarshal([]byte(want), &wanted); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(wanted, printed); diff != "" {
		t.Errorf("answer (-want +got):\n%s", diff)
	}
}

// wantSilence checks that the plugin succeeded and printed nothing on stdout.
func wantSilence(t *testing.T, got cniAnswer) {
	t.Helper()
	if got.exit != 0 || got.stdout != "" {
		t.Fatalf("exit %d, stdout %s, stderr %s: want 0 and nothing", got.exit, got.stdout, got.stderr)
	}
}

// wantRefusal checks that the plugin failed with one error of CNI, which has the
// code and names every part.
func wantRefusal(t *testing.T, got cniAnswer, code uint, parts ...string) {
	t.Helper()
	var printed struct {
		Code uint   `json:"code"`
		Msg  string `json:"msg"`
	}
	if err := json.Unmarshal([]byte(got.stdout), &printed); err != nil || got.exit == 0 {
		t.Fatalf("exit %d, stdout %s, stderr %s: %v: want an error of CNI", got.exit, got.stdout, got.stderr, err)
	}
	missing := slices.DeleteFunc(slices.Clone(parts), func(part string) bool { return strings.Contains(printed.Msg, part) })
	if printed.Code != code || len(missing) > 0 {
		t.Errorf("error %d %q: want %d, naming %q", printed.Code, printed.Msg, code, missing)
	}
}
