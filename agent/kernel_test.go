// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/test"
)

// node is a node of its own with an agent, whose Consul is a fake that says
// what the test wants registered.
type node struct {
	*redirect.Datapath
	t      *testing.T
	config configfile.Config
	fake   *fakeConsul
	agent  *Agent
	ports  []any // that the job maps
}

func newNode(t *testing.T) *node {
	t.Helper()
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	dir := t.TempDir()
	n := &node{t: t, config: configfile.DefaultConfig(), fake: newFakeConsul(t), ports: []any{mapped(20001)}}
	n.config.PinDir, n.config.StateDir = filepath.Join(test.BPFFS(t), "weir"), filepath.Join(dir, "state")
	n.config.CgroupRoot, n.config.CNI.CacheDir = test.NewCgroup(t).Path, filepath.Join(dir, "cni")
	n.config.CNI.NetNSDir, n.config.Docker.Socket = filepath.Join(dir, "netns"), ""
	n.config.Consul.Address, n.config.Consul.Watch = n.fake.URL, false
	n.config.Telemetry.Listen, n.config.Gate.Timeout = "127.0.0.1:0", "0s" // what no proxy takes is refused at once
	n.Datapath = redirect.New(n.config.Paths())
	for _, needed := range []string{filepath.Join(n.config.CNI.CacheDir, "results"), n.config.CNI.NetNSDir} {
		if err := os.MkdirAll(needed, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if _, err := n.Unload(); err != nil {
			t.Errorf("unload: %v", err)
		}
	})
	return n
}

// run starts the agent; it ends with the test.
func (n *node) run(change ...func(*Agent)) {
	n.t.Helper()
	instance, err := New(n.config, Options{Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		n.t.Fatal(err)
	}
	for _, edit := range change {
		edit(instance)
	}
	n.agent = instance
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- instance.Run(ctx) }()
	n.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Errorf("agent: %v", err)
		}
	})
}

// cached writes a result of libcni's.
func (n *node) cached(id, netns, mesh string) {
	n.t.Helper()
	n.result(id, netns, mesh)
}

// cachedWith is cached for a plain job, with the addresses that the plugins gave.
func (n *node) cachedWith(id, netns string, addresses ...string) {
	n.t.Helper()
	n.result(id, netns, "", addresses...)
}

func (n *node) result(id, netns, mesh string, addresses ...string) {
	n.t.Helper()
	const plain = `{"cniVersion":"1.0.0","name":"nomad","plugins":[{"type":"bridge"}]}`
	const redirected = `{"cniVersion":"1.0.0","name":"nomad","plugins":[{"type":"bridge"},{"type":"consul-cni"}]}`
	if mesh == "" {
		n.resultOf(id, netns, plain, nil, addresses...)
		return
	}
	n.resultOf(id, netns, redirected, [][2]string{{"CONSUL_IPTABLES_CONFIG", mesh}}, addresses...)
}

// resultOf is result for any network configuration and any arguments.
func (n *node) resultOf(id, netns, conf string, args [][2]string, addresses ...string) {
	n.t.Helper()
	ips := []any{}
	for _, address := range addresses {
		ips = append(ips, map[string]any{"interface": 0, "address": address})
	}
	entry := map[string]any{
		"kind": "cniCacheV1", "containerId": id, "ifName": "eth0", "networkName": "nomad", "netns": netns,
		"cniArgs":        slices.Concat([][2]string{{"NOMAD_ALLOC_ID", id}}, args),
		"config":         []byte(conf),
		"capabilityArgs": map[string]any{"portMappings": n.ports},
		"result":         map[string]any{"interfaces": []any{map[string]any{"name": "eth0", "sandbox": netns}}, "ips": ips},
	}
	data, err := json.Marshal(entry)
	if err != nil {
		n.t.Fatal(err)
	}
	test.WriteFile(n.t, filepath.Join(n.config.CNI.CacheDir, "results", "nomad-"+id+"-eth0"), string(data))
}

func mapped(port int) any {
	return map[string]any{"hostPort": port, "containerPort": port, "protocol": "tcp"}
}

// registered is the bulk answer with a sidecar for each allocation.
func registered(ids ...string) http.HandlerFunc { return registeredAt(20001, ids...) }

// registeredAt is registered with another inbound listener.
func registeredAt(port uint16, ids ...string) http.HandlerFunc {
	services := make(map[string]any)
	for _, id := range ids {
		services["_nomad-task-"+id+"-group-g-web-80-sidecar-proxy"] = map[string]any{"Kind": "connect-proxy", "Service": "web-sidecar-proxy", "Port": port}
	}
	data, err := json.Marshal(services)
	if err != nil {
		return say(500, err.Error())
	}
	return say(200, string(data))
}

// eventually waits until the agent shows the allocation in the state.
func (n *node) eventually(id string, state api.State) (found api.WorkloadView) {
	n.t.Helper()
	test.Eventually(n.t, func() error {
		for _, w := range n.agent.Status().Workloads {
			if found = w; w.ID == id && w.State == state {
				return nil
			}
		}
		return fmt.Errorf("the agent shows %+v", n.agent.Status().Workloads)
	}, fmt.Sprintf("allocation %s to be %s", id, state))
	return found
}

func numbered(i int) string { return fmt.Sprintf("b412a0b1-e285-703a-01ba-%012d", i) }

func TestAgentLeavesConsulsOwnRulesAlone(t *testing.T) {
	n := newNode(t)
	test.Need(t, test.Tool("iptables"))
	ns := test.NewNetNS(t)
	ns.Do(func() {
		for _, args := range [][]string{{"-t", "nat", "-N", "CONSUL_PROXY_INBOUND"}} {
			if out, err := exec.Command("iptables", args...).CombinedOutput(); err != nil {
				t.Errorf("iptables %v: %v\n%s", args, err, out)
			}
		}
	})
	n.cached(numbered(1), ns.Path, `{"ProxyUserID":"101"}`)
	n.cached(numbered(2), ns.Path, "")
	n.fake.answers(registered(numbered(1), numbered(2)))
	n.run()
	n.eventually(numbered(1), api.StateConsul)
	n.eventually(numbered(2), api.StateConsul)
	if list, err := n.Records(); err != nil || len(list) > 0 {
		t.Errorf("on record: %+v, %v; want nothing", list, err)
	}
}

func TestAgentListsWhatItCannotProtect(t *testing.T) {
	n := newNode(t)
	n.cached(numbered(1), "/proc/self/ns/net", "")
	n.fake.answers(registered(numbered(1), numbered(2)))
	n.run()
	for i, want := range []string{host.ErrHostNetNS.Error(), "no network namespace of it is known"} {
		view := n.eventually(numbered(i+1), api.StateUnprotected)
		if !strings.Contains(fmt.Sprint(view.Problems), want) {
			t.Errorf("problems of allocation %d = %q, want %q", i+1, view.Problems, want)
		}
	}
}

// An allocation that was over when Nomad's client started keeps its result in
// libcni's cache, with nobody to protect: that is no fault of the mesh.
func TestAgentNamesWhatIsOver(t *testing.T) {
	n := newNode(t)
	gone := filepath.Join(t.TempDir(), "gone")
	n.cached(numbered(1), gone, `{"ProxyUserID":"101"}`) // by transparent_proxy
	n.cached(numbered(2), gone, "")                      // by a registration that nobody took back
	n.cached(numbered(3), gone, "")                      // not in the mesh
	ns := test.NewNetNS(t)
	n.result(numbered(4), ns.Path, `{"ProxyUserID":"101"}`, addressed(t, ns))
	n.fake.answers(registered(numbered(2), numbered(4)))
	n.run()
	for _, id := range []string{numbered(1), numbered(2)} {
		view := n.eventually(id, api.StateEnded)
		if len(view.Problems) != 1 || !strings.Contains(view.Problems[0].Remedy, "weir gc") {
			t.Errorf("problems of %s = %q, want the remedy alone", id, view.Problems)
		}
	}
	n.eventually(numbered(4), api.StateManaged)
	ns.End()
	if view := n.eventually(numbered(4), api.StateEnded); len(view.Problems) != 1 {
		t.Errorf("problems = %q, want the remedy alone", view.Problems)
	}
	// A step may have been at it when the namespace ended; none is tried again.
	told := n.agent.Status()
	test.Eventually(t, func() error {
		if alive := n.agent.Status().Alive; !alive.After(told.Alive.Add(tick)) {
			return fmt.Errorf("the last turn was at %s", alive)
		}
		return nil
	}, "more turns of the agent")
	if failures := n.agent.Status().Counts.Failures; failures != told.Counts.Failures {
		t.Errorf("%d steps failed, want none: there is nothing to be done again", failures-told.Counts.Failures)
	}
	for _, w := range n.agent.Status().Workloads {
		if w.ID == numbered(3) {
			t.Errorf("it shows %+v, which is not in the mesh", w)
		}
	}
}

// A namespace that comes back under the same path and ID is another one, which
// is what a task driver that restarts leaves behind.
func TestAgentTakesOverAReplacedNamespace(t *testing.T) {
	n := newNode(t)
	first, second := test.NewNetNS(t), test.NewNetNS(t)
	path := filepath.Join(t.TempDir(), "netns")
	link := func(target string) {
		t.Helper()
		if err := os.Symlink(target, path+".new"); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	link(first.Path)
	n.cached(numbered(1), path, "")
	n.fake.answers(registered(numbered(1)))
	n.run()
	n.eventually(numbered(1), api.StateManaged)
	n.wantCookie(first.Cookie())
	link(second.Path)
	n.wantCookie(second.Cookie())
}

func (n *node) wantCookie(cookie uint64) {
	n.t.Helper()
	test.Eventually(n.t, func() error {
		list, err := n.Records()
		if err != nil {
			return err
		}
		if len(list) != 1 || list[0].Cookie != cookie || list[0].MeshConfig.InboundPort != 20001 {
			return fmt.Errorf("on record: %+v, want cookie %d with its overlay", list, cookie)
		}
		return nil
	}, "the namespace to be on record")
}

// New allocations are noticed when they come, and not at the next look at everything,
// which is minutes away.
func TestAgentNoticesAnAllocationThatComes(t *testing.T) {
	n := newNode(t)
	n.fake.answers(registered(numbered(1), numbered(2)))
	n.run()
	for i := range 2 { // the second is not the first pass
		ns := test.NewNetNS(t)
		n.cached(numbered(i+1), ns.Path, "")
		n.eventually(numbered(i+1), api.StateManaged)
	}
}

// What Prometheus reads is what happened: each connection by what was decided
// about it, and each thing that the agent did, once.
func TestTelemetry(t *testing.T) {
	n := newNode(t)
	cgroup := test.NewCgroup(t)
	n.config.CgroupRoot = cgroup.Path
	n.Datapath = redirect.New(n.config.Paths())
	dying := test.NewNetNS(t)
	n.cached(numbered(1), dying.Path, "")
	mesh, _ := n.transparent(numbered(2))
	n.fake.answers(registered(numbered(1), numbered(2)))
	n.run()
	n.eventually(numbered(1), api.StateManaged)
	n.eventually(numbered(2), api.StateManaged)
	address := n.agent.Status().Telemetry
	if code, text := get(t, "http://"+address+"/health"); code != 200 || !strings.Contains(text, `"healthy":true`) {
		t.Errorf("health = %d, %s", code, text)
	}
	if code, _ := get(t, "http://"+address+"/v1/status"); code != 404 {
		t.Errorf("the local API answers %d on the telemetry address, want 404", code)
	}
	scraped := func(want ...string) error {
		code, text := get(t, "http://"+address+"/metrics")
		for _, line := range want {
			if code != 200 || !slices.Contains(strings.Split(text, "\n"), line) {
				return fmt.Errorf("metrics (%d) lack %s", code, line)
			}
		}
		return nil
	}
	eventually := func(what string, want ...string) {
		t.Helper()
		test.Eventually(t, func() error { return scraped(want...) }, what)
	}
	action := func(name string, count int) string {
		return fmt.Sprintf("weir_actions_total{action=%q} %d", name, count)
	}
	eventually("the node as it is",
		`weir_healthy 1`, `weir_consul_in_sync 1`, `weir_consul_proxies 2`,
		`weir_workloads{egress="off",guard="audit",mode="direct",state="managed"} 1`, `weir_workloads{egress="off",guard="audit",mode="transparent",state="managed"} 1`,
		`weir_workload_in_sync{alloc_id="`+numbered(1)+`",interface="eth0",namespace="",nomad_job="",task_group=""} 1`,
		action("added", 1), action("repaired", 0), action("pruned", 0), action("removed", 0), action("failed", 0))

	verdict := func(verdict bpfmap.Verdict, count int) string {
		return fmt.Sprintf(`weir_verdicts_total{alloc_id=%q,interface="eth0",namespace="",nomad_job="",refused="%t",task_group="",verdict=%q} %d`, numbered(2), verdict.Refused(), verdict, count)
	}
	task := test.NewClient(t, test.Spec{NetNS: mesh, Cgroup: cgroup, UID: 1000, GID: 1000})
	dial := func(target string, served bool) {
		t.Helper()
		if _, err := task.Ask("tcp4", target); (err == nil) != served {
			t.Errorf("dial of %s: %v, want it served: %t", target, err, served)
		}
	}
	dial("127.128.0.1:80", false)
	dial("198.51.100.1:80", false)
	proxy := test.EchoProcess(t, test.Spec{NetNS: mesh, Cgroup: cgroup, UID: 101, GID: 101}, "tcp4", "127.0.0.1:15001")
	dial("198.51.100.1:80", true)
	dial("198.51.100.2:80", true)
	dial(proxy.Addr.String(), true)
	if err := scraped(verdict(bpfmap.RefusedEncoded, 1), verdict(bpfmap.RefusedNoProxy, 1), verdict(bpfmap.Redirected, 2), verdict(bpfmap.Local, 1)); err != nil {
		t.Error(err)
	}
	err := scraped(`weir_table_rows{table="origins"} 2`, fmt.Sprintf(`weir_table_max_rows{table="origins"} %d`, bpfmap.DefaultOrigins),
		`weir_table_rows{table="workloads"} 2`, fmt.Sprintf(`weir_events_lost_total{alloc_id=%q,interface="eth0",namespace="",nomad_job="",task_group=""} 0`, numbered(2)))
	if err != nil {
		t.Error(err)
	}

	changed := int(n.agent.Status().Counts.Changes)
	n.fake.answers(registeredAt(20002, numbered(1)))
	eventually("a change in Consul to be counted", action("changed", changed+1))
	if err := os.Remove(filepath.Join(n.config.PinDir, "links", "weir_getsockopt")); err != nil {
		t.Fatal(err)
	}
	eventually("a repair to be counted", action("repaired", 1), `weir_healthy 1`)
	dying.End()
	eventually("the end of a namespace to be counted", action("pruned", 1), action("repaired", 1), action("changed", changed+1), action("removed", 0))
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	response, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(body)
}
