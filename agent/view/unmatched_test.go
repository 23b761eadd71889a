// SPDX-License-Identifier: MPL-2.0

package view

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// numbered is the ID of an allocation.
func numbered(i int) string { return fmt.Sprintf("b412a0b1-e285-703a-01ba-%012d", i) }

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
			u, first := make(Unmatched), time.Now()
			if c.onNode { // and so it stays
				u[c.line] = seen{onNode: true, looked: first}
			}
			consul := catalog.Snapshot{Proxies: catalog.ByAllocation(proxies)}
			lines := u.Lines(nil, consul, discover.Containers{}, first)
			if len(lines) != 1 || lines[0].ID != c.line || lines[0].State != c.want || !lines[0].Since.Equal(first) {
				t.Fatalf("lines = %+v, want one for %s, %s since now", lines, c.line, c.want)
			}
			if told := len(lines[0].Problems) > 0; told != (c.want != api.StateHost) {
				t.Errorf("problems = %q", lines[0].Problems)
			}
			again := u.Lines(nil, consul, discover.Containers{}, first.Add(time.Minute))
			if len(again) != 1 || !again[0].Since.Equal(first) {
				t.Errorf("a minute later: %+v, want it to be so since then", again)
			}
			faults := api.Status{Alive: first, Workloads: again}.ProblemsAt(first.Add(api.SettleTime - time.Second))
			if len(faults) > 0 {
				t.Errorf("at once it counts as wrong: %q", faults)
			}
			faults = api.Status{Alive: first, Workloads: again}.ProblemsAt(first.Add(api.SettleTime))
			if wrong := len(faults) > 0; wrong != (c.want == api.StateUnprotected) {
				t.Errorf("then it counts as wrong: %t, %q", wrong, faults)
			}
			own := desired.Allocation{Attachment: discover.Attachment{Job: workload.Job{AllocID: numbered(1)}}, Proxies: proxies}
			if lines := u.Lines([]desired.Allocation{own}, consul, discover.Containers{}, first); len(lines) > 0 || len(u) > 0 {
				t.Errorf("with a namespace: %+v, remembered %+v; want nothing", lines, u)
			}
		})
	}
}

// The task that Nomad injected for a gateway tells where it is, and no other
// task, allocation or namespace does.
func TestGatewayIsSeenOnTheNode(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2)
	var known discover.Containers
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
	known = discover.Containers{Tasks: map[string]string{container: "connect-mesh-gw"}, Allocs: map[string]string{container: numbered(2)}}
	runs(scopes.Child(t, "docker-"+container+".scope"))
	if seenOnNode(numbered(1), gateway, known) {
		t.Error("it is seen on the node, where another task, another allocation's and one in a namespace run")
	}
	known.Allocs[container] = numbered(1)
	if !seenOnNode(numbered(1), gateway, known) {
		t.Error("its container on the node is not seen")
	}
	known = discover.Containers{}
	runs(scope(numbered(1), "connect-mesh-gw-1a2b3c"))
	if !seenOnNode(numbered(1), gateway, known) {
		t.Error("its task on the node is not seen")
	}
}
