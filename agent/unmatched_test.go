// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// A registration without a namespace is a fault where something should be
// guarded, and none where Nomad puts it on the node's own network.
func TestUnmatchedProxies(t *testing.T) {
	const asNomadBinds = `"Config": {"envoy_gateway_no_default_bind": true, "envoy_gateway_bind_addresses": {"wan": {"Address": "0.0.0.0", "Port": 8443}}}`
	nomads := "_nomad-task-" + numbered(1) + "-group-g-gw-80"
	for _, c := range []struct {
		name, id, registration string
		onNode                 bool
		want                   api.State
		line                   string
	}{
		{"a sidecar", nomads + "-sidecar-proxy", `"Kind": "connect-proxy", "Port": 20001`, false, api.StateUnprotected, numbered(1)},
		{"a sidecar under any circumstances", nomads + "-sidecar-proxy", `"Kind": "connect-proxy", "Port": 20001`, true, api.StateUnprotected, numbered(1)},
		{"an ingress gateway in host mode", nomads, `"Kind": "ingress-gateway", "Port": 9081`, false, api.StateHost, numbered(1)},
		{"a terminating gateway in host mode", nomads, `"Kind": "terminating-gateway", "Port": 8443, "Proxy": {"Config": {"connect_timeout_ms": 5000}}`, false, api.StateHost, numbered(1)},
		{"a mesh gateway in bridge mode", nomads, `"Kind": "mesh-gateway", "Port": 8443, "Proxy": {` + asNomadBinds + `}`, false, api.StateUnprotected, numbered(1)},
		{"a mesh gateway in host mode whose job binds it", nomads, `"Kind": "mesh-gateway", "Port": 8443, "Proxy": {` + asNomadBinds + `}`, true, api.StateHost, numbered(1)},
		{"one that binds tagged addresses", nomads, `"Kind": "mesh-gateway", "Port": 8443, "Proxy": {"Config": {"envoy_gateway_bind_tagged_addresses": true}}`, false, api.StateUnprotected, numbered(1)},
		{"an API gateway that registered itself", "front", `"Kind": "api-gateway", "Service": "front", "Port": 8443`, false, api.StateUnclaimed, "front"},
		{"a sidecar of a service outside of Nomad", "db-sidecar-proxy", `"Kind": "connect-proxy", "Port": 21000`, false, api.StateUnclaimed, "db-sidecar-proxy"},
	} {
		t.Run(c.name, func(t *testing.T) {
			proxies, problems, err := registration.ParseServices([]byte(fmt.Sprintf(`{%q: {%s}}`, c.id, c.registration)), registration.Loopback4())
			if err != nil || len(problems) > 0 || len(proxies) != 1 {
				t.Fatalf("proxies %+v, %q, %v", proxies, problems, err)
			}
			config := configfile.DefaultConfig()
			config.Docker.Socket = ""
			a, err := New(config, Options{})
			if err != nil {
				t.Fatal(err)
			}
			seen := time.Now()
			if c.onNode { // and so it stays
				a.unmatchedSince[c.line] = unmatchedProxy{onNode: true, looked: seen}
			}
			consul := catalog.Snapshot{Proxies: catalog.ByAllocation(proxies)}
			lines := a.unmatched(nil, consul, seen)
			if len(lines) != 1 || lines[0].ID != c.line || lines[0].State != c.want || !lines[0].Since.Equal(seen) {
				t.Fatalf("lines = %+v, want one for %s, %s since now", lines, c.line, c.want)
			}
			if told := len(lines[0].Problems) > 0; told != (c.want != api.StateHost) {
				t.Errorf("problems = %q", lines[0].Problems)
			}
			again := a.unmatched(nil, consul, seen.Add(time.Minute))
			if len(again) != 1 || !again[0].Since.Equal(seen) {
				t.Errorf("a minute later: %+v, want it to be so since then", again)
			}
			faults := api.Status{Alive: seen, Workloads: again}.ProblemsAt(seen.Add(api.SettleTime - time.Second))
			if len(faults) > 0 {
				t.Errorf("at once it counts as wrong: %q", faults)
			}
			faults = api.Status{Alive: seen, Workloads: again}.ProblemsAt(seen.Add(api.SettleTime))
			if wrong := len(faults) > 0; wrong != (c.want == api.StateUnprotected) {
				t.Errorf("then it counts as wrong: %t, %q", wrong, faults)
			}
			own := desired.Allocation{Attachment: discover.Attachment{Job: workload.Job{AllocID: numbered(1)}}, Proxies: proxies}
			if lines := a.unmatched([]desired.Allocation{own}, consul, seen); len(lines) > 0 || len(a.unmatchedSince) > 0 {
				t.Errorf("with a namespace: %+v, remembered %+v; want nothing", lines, a.unmatchedSince)
			}
		})
	}
}

// The task that Nomad injected for a gateway tells where it is, and no other
// task, allocation or namespace does.
func TestGatewayIsSeenOnTheNode(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2)
	docker := &discover.Docker{}
	a := &Agent{docker: docker}
	gateway := []registration.Proxy{{ID: "gw", Kind: registration.KindMesh, AllocID: numbered(1), Self: registration.Service{Name: "gw"}}}
	scopes := test.NewCgroup(t)
	scope := func(alloc, task string) *test.Cgroup { return scopes.Child(t, alloc+"."+task+".scope") }
	runs := func(scope *test.Cgroup) {
		t.Helper()
		dir, err := os.Open(scope.Path)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		task := exec.Command("sleep", "600")
		task.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: syscall.SIGKILL}
		if err := task.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := task.Process.Kill(); err != nil {
				t.Error(err)
			}
			_ = task.Wait() // it was killed
		})
	}
	runs(scope(numbered(1), "app"))
	runs(scope(numbered(2), "connect-mesh-gw"))
	test.NewClient(t, test.Spec{NetNS: test.NewNetNS(t), Cgroup: scope(numbered(1), "connect-mesh-gw"), UID: 101, GID: 101})
	container := strings.Repeat("c", 64)
	docker.View = discover.Containers{Tasks: map[string]string{container: "connect-mesh-gw"}, Allocs: map[string]string{container: numbered(2)}}
	runs(scopes.Child(t, "docker-"+container+".scope"))
	if a.seenOnNode(numbered(1), gateway) {
		t.Error("it is seen on the node, where another task, another allocation's and one in a namespace run")
	}
	docker.View.Allocs[container] = numbered(1)
	if !a.seenOnNode(numbered(1), gateway) {
		t.Error("its container on the node is not seen")
	}
	docker.View = discover.Containers{}
	runs(scope(numbered(1), "connect-mesh-gw-1a2b3c"))
	if !a.seenOnNode(numbered(1), gateway) {
		t.Error("its task on the node is not seen")
	}
}

// What many allocations have in common is said once, and nothing of those that
// are in order by themselves.
func TestProblemsOfManyAllocations(t *testing.T) {
	now := time.Now()
	old := now.Add(-time.Hour)
	forbidden := health.NewProblem(health.ProblemConsulForbidden, "a token", "403")
	gone := health.NewProblem(health.ProblemStepFailed, "stop it", "its namespace is gone")
	status := api.Status{Alive: now.Add(-api.Stuck - time.Second), DataPath: "no cgroup root", Workloads: []api.WorkloadView{
		{ID: "1", Job: "web", Group: "g", State: api.StateManaged, Since: old, Problems: []health.Problem{forbidden}},
		{ID: "2", State: api.StateUnprotected, Since: old, Problems: []health.Problem{gone}},
		{ID: "3", State: api.StateConsul, Since: old, Problems: []health.Problem{gone}},
		{ID: "4", State: api.StateEnded, Since: old, Problems: []health.Problem{gone}},
		{ID: "5", State: api.StateUnclaimed, Since: old, Problems: []health.Problem{gone}},
		{ID: "6", State: api.StateUnprotected, Since: now, Problems: []health.Problem{gone}},
	}}
	for i := 7; i < 11; i++ {
		status.Workloads = append(status.Workloads, api.WorkloadView{ID: fmt.Sprint(i), State: api.StateManaged, Since: old, Problems: []health.Problem{forbidden.Of("allocation "+fmt.Sprint(i), fmt.Sprint(i))}})
	}
	want := []string{
		"the agent's reconcile loop has stalled for 31s [agent-stalled]", "the agent cannot repair the data path: no cgroup root [repair-failed]",
		"5 allocations, among them 1 (web/g), 7, 8: 403 [consul-forbidden]", "allocation 2: its namespace is gone [step-failed]",
	}
	var got []string
	for _, problem := range status.ProblemsAt(now) {
		got = append(got, problem.Text())
		if alone := problem.Subject == "allocation 2"; alone != (problem.AllocID == "2") {
			t.Errorf("%q is of allocation %q", problem, problem.AllocID)
		}
		if problem.Remedy == "" {
			t.Errorf("%q has no remedy", problem.What)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
}

// The agent's own list is what "weir status" shows, and Prometheus counts it.
func TestAgentListsItsProblems(t *testing.T) {
	n := newNode(t)
	n.config.Consul.Watch = true
	n.fake.set(&n.fake.changes, say(429, "slow down"))
	n.fake.answers(say(200, `{"bad": {"Kind": "connect-proxy", "Port": "a lot"}}`))
	test.WriteFile(t, filepath.Join(n.config.CNI.CacheDir, "results", "half"), "{")
	n.config.Docker.Socket = test.WriteFile(t, filepath.Join(t.TempDir(), "docker.sock"), "nobody listens")
	n.run()
	wants := []string{"the Consul watch is failing", "registration bad cannot be read", "CNI result", "Docker's containers may be other ones"}
	test.Eventually(t, func() error {
		status := n.agent.Status()
		told := fmt.Sprint(status.Problems)
		for _, want := range wants {
			if !strings.Contains(told, want) {
				return fmt.Errorf("%q is not among %s", want, told)
			}
		}
		if len(status.Problems) != len(wants) || !strings.Contains(status.Consul.Watch, "429") {
			return fmt.Errorf("problems are %s, watch is %q", told, status.Consul.Watch)
		}
		return nil
	}, "all to be told, once each")
	_, text := get(t, "http://"+n.agent.Status().Telemetry+"/metrics")
	for _, want := range []string{
		`weir_problems{code="consul-watch",severity="warning"} 1`, `weir_problems{code="registration-unusable",severity="error"} 1`,
		`weir_problems{code="state-unreadable",severity="error"} 1`, `weir_problems{code="docker-unreachable",severity="warning"} 1`, "weir_consul_watch 0",
	} {
		if !strings.Contains(text, "\n"+want+"\n") {
			t.Errorf("metrics lack %s", want)
		}
	}
	n.fake.set(&n.fake.changes, nothingChanges)
	test.Eventually(t, func() error {
		if told := fmt.Sprint(n.agent.Status().Problems); strings.Contains(told, wants[0]) {
			return fmt.Errorf("problems are %s", told)
		}
		return nil
	}, "the trigger to be back")
}
