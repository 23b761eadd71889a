// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/test"
)

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
