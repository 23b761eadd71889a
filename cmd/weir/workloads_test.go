// SPDX-License-Identifier: MPL-2.0

package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

func TestWorkloads(t *testing.T) {
	n := &node{list: []inspect.WorkloadStatus{
		{
			Key: workload.AttachmentID{ContainerID: "0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01", IfName: "eth0"},
			ID:  "0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01", Job: "demo", Group: "web", Mode: workload.ModeTransparent, Guard: workload.GuardEnforce,
			Proxy:    inspect.ProxyStatus{UID: 101, Identity: inspect.IdentityCgroup, Inbound: 20000, Outbound: 15001, Listeners: 4},
			Sidecars: []inspect.ProxyStatus{{Service: "api", UID: 101, Identity: inspect.IdentityCgroup, Inbound: 20001, Listeners: 1}},
			Origins:  12, Budget: 65536,
		},
		{
			Key: workload.AttachmentID{ContainerID: "1c6e1d2f", IfName: "eth0"}, ID: "1c6e1d2f", Mode: workload.ModeTransparent, Guard: workload.GuardEnforce,
			Proxy: inspect.ProxyStatus{UID: 101, Identity: inspect.IdentityUID, Outbound: 15001}, Budget: 65536,
			Notes:    []string{"port \"0\" in ExcludeInboundPorts means nothing"},
			Problems: []health.Problem{{What: "its namespace is gone", Remedy: "run CNI DEL or GC"}},
		},
	}}
	want(t, try(t, n, nil, "workloads"), outcome{stdout: `ID        JOB   GROUP  PROTECTED  BY        PROXY  GUARD    CONSUL
0b5d0c1e  demo  web    yes        redirect  up     enforce  -
1c6e1d2f  -     -      no         redirect  down   enforce  -

1c6e1d2f
  its namespace is gone
    remedy: run CNI DEL or GC
  note: port "0" in ExcludeInboundPorts means nothing
`})
	got := try(t, n, nil, "workloads", "-verbose", "0b5").stdout
	for _, want := range []string{
		"PROXY UID  IDENTITY  INBOUND  OUTBOUND  LISTENERS  ORIGINS      GUARD    EGRESS  ",
		"\n0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01  demo  web    yes        redirect  -      transparent  -     -     up     101        cgroup    20000    15001     4          12 of 65536  enforce  -       -       -      -          -\n",
		" + api  ", " 101        cgroup    20001    -         1\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("workloads -verbose lacks %q:\n%s", want, got)
		}
	}
}

// The egress guard of those that have one has a column of its own.
func TestWorkloadsWithAnEgressGuard(t *testing.T) {
	n := &node{list: []inspect.WorkloadStatus{
		{Key: workload.AttachmentID{ContainerID: "1c6e1d2f", IfName: "eth0"}, ID: "1c6e1d2f", Job: "a", Group: "g", Mode: workload.ModeTransparent, Guard: workload.GuardAudit, Egress: workload.GuardEnforce},
		{Key: workload.AttachmentID{ContainerID: "2c6e1d2f", IfName: "eth0"}, ID: "2c6e1d2f", Job: "b", Group: "g", Mode: workload.ModeTransparent, Guard: workload.GuardAudit, Egress: workload.GuardOff},
	}}
	if got := try(t, n, nil, "workloads").stdout; !strings.HasPrefix(got, `ID        JOB  GROUP  PROTECTED  BY        PROXY  GUARD  EGRESS   CONSUL
1c6e1d2f  a    g      yes        redirect  down   audit  enforce  -
2c6e1d2f  b    g      yes        redirect  down   audit  off      -
`) {
		t.Errorf("workloads:\n%s", got)
	}
}

// Whatever the names: a terminal has 80 columns.
func TestWorkloadsFitATerminal(t *testing.T) {
	n := &node{agent: &api.Status{}}
	for i, job := range []string{"payments-settlement-production", "web", "größte-aller-möglichen-bezeichnungen"} {
		w := inspect.WorkloadStatus{
			Key: workload.AttachmentID{ContainerID: fmt.Sprintf("%d6e1d2f8", i), IfName: "eth0"}, ID: fmt.Sprintf("%d6e1d2f8", i), Job: job,
			Group: "settlement-workers", Mode: workload.ModeTransparent, Guard: workload.GuardEnforce,
		}
		n.list = append(n.list, w)
		n.agent.Workloads = append(n.agent.Workloads, api.WorkloadView{Key: w.Key, State: api.StateManaged, Proxies: []api.ProxyView{{}}})
	}
	got := try(t, n, nil, "workloads").stdout
	for line := range strings.Lines(got) {
		if width := len([]rune(strings.TrimRight(line, "\n"))); width > 80 {
			t.Errorf("a line has %d columns:\n%s", width, line)
		}
	}
	if !strings.Contains(got, "06e1d2f8  payments-s…  settlement-…  ") || !strings.Contains(got, "16e1d2f8  web          settlement-…  ") || !strings.Contains(got, "26e1d2f8  größte-all…  settlement-…  ") {
		t.Errorf("names are not cut to what there is room for:\n%s", got)
	}
	if got := try(t, n, nil, "workloads", "-verbose").stdout; !strings.Contains(got, "payments-settlement-production        settlement-workers  ") {
		t.Errorf("-verbose does not show whole names:\n%s", got)
	}
}

// Each answer is what the node really does about a connection past the proxy, and no answer but yes
// is without its reason.
func TestProtected(t *testing.T) {
	wrong := []health.Problem{{What: "rows are missing", Remedy: "run CNI CHECK"}}
	for _, c := range []struct {
		mode     workload.Mode
		guard    workload.Guard
		problems []health.Problem
		state    api.State
		want     string
		reason   string
	}{
		{workload.ModeTransparent, workload.GuardOff, nil, api.StateManaged, "yes redirect", ""},
		{workload.ModeTransparent, workload.GuardAudit, nil, "", "yes redirect", ""},
		{workload.ModeTransparent, workload.GuardEnforce, wrong, api.StateManaged, "no redirect", "\n  rows are missing\n"},
		{workload.ModeDirect, workload.GuardEnforce, nil, api.StateManaged, "yes guard", ""},
		{workload.ModeDirect, workload.GuardAudit, nil, api.StateManaged, "audit guard", "\naudit: connections past the proxy are let in, and 'weir guard' lists them;\n  guard \"enforce\" refuses them\n  1c6e1d2f\n"},
		{workload.ModeGateway, workload.GuardAudit, nil, api.StateManaged, "audit guard", "\naudit: "},
		{workload.ModeDirect, "", nil, "", "no -", "\nno: the guard is off: connections past the proxy are let in\n"},
		{"", "", nil, api.StateConsul, "no consul", "\nno: Consul's own rules redirect it"},
		{"", "", nil, api.StateHost, "no host", "\nno: it is on the node's own network"},
		{"", "", wrong, api.StateUnprotected, "no -", "\n  rows are missing\n"},
		{"", "", wrong, api.StateUnclaimed, "no -", "\n  rows are missing\n"},
		{"", "", wrong, api.StateEnded, "- -", "\n  rows are missing\n"},
	} {
		key := workload.AttachmentID{ContainerID: "1c6e1d2f", IfName: "eth0"}
		n := &node{}
		if c.mode != "" {
			n.list = []inspect.WorkloadStatus{{Key: key, ID: "1c6e1d2f", Mode: c.mode, Guard: c.guard, Problems: c.problems}}
		}
		if c.state != "" {
			n.agent = &api.Status{Workloads: []api.WorkloadView{{Key: key, ID: "1c6e1d2f", State: c.state, Problems: c.problems}}}
		}
		got := try(t, n, nil, "workloads").stdout
		row := strings.Fields(strings.Split(got, "\n")[1])
		if strings.Join(row[3:5], " ") != c.want || !strings.Contains(got, c.reason) || c.reason == "" && strings.Contains(got, "1c6e1d2f\n") {
			t.Errorf("%+v:\n%s", c, got)
		}
		if count := strings.Count(got, "rows are missing"); count > 1 {
			t.Errorf("%+v: the problem is told %d times:\n%s", c, count, got)
		}
	}
}

func TestNoWorkloads(t *testing.T) {
	want(t, try(t, &node{}, nil, "workloads"), outcome{stdout: "no workloads\n"})
	want(t, try(t, &node{}, nil, "workloads", "-json"), outcome{stdout: "{\n  \"schema\": 1,\n  \"workloads\": []\n}\n"})
}

// No namespace is looked at that is not asked about: each costs a dozen dumps of the
// kernel's lists, and a node has a thousand.
func TestWorkloadsOfAJobLooksAtItsOwn(t *testing.T) {
	n := &node{list: []inspect.WorkloadStatus{
		{Key: workload.AttachmentID{ContainerID: "1c6e1d2f", IfName: "eth0"}, ID: "1c6e1d2f", Job: "a", Group: "g"},
		{Key: workload.AttachmentID{ContainerID: "2c6e1d2f", IfName: "eth0"}, ID: "2c6e1d2f", Job: "b", Group: "g"},
		{Key: workload.AttachmentID{ContainerID: "3c6e1d2f", IfName: "eth0"}, ID: "3c6e1d2f", Job: "b", Group: "g"},
	}}
	for argument, want := range map[string][]workload.AttachmentID{
		"b": {n.list[1].Key, n.list[2].Key}, "1c6": {n.list[0].Key}, "": nil,
	} {
		n.lookedFor = nil
		args := slices.DeleteFunc([]string{"workloads", argument}, func(arg string) bool { return arg == "" })
		if got := try(t, n, nil, args...); got.code != 0 {
			t.Fatalf("weir %v: %+v", args, got)
		}
		if diff := cmp.Diff([][]workload.AttachmentID{want}, n.lookedFor); diff != "" {
			t.Errorf("weir %v looked at (-want +got):\n%s", args, diff)
		}
	}
	// Nothing is looked at for what the agent alone sees.
	n.agent = &api.Status{Workloads: []api.WorkloadView{{Key: workload.AttachmentID{ContainerID: "4c6e1d2f"}, ID: "4c6e1d2f", Job: "c", State: api.StateHost}}}
	n.lookedFor = nil
	if got := try(t, n, nil, "workloads", "c"); got.code != 0 || len(n.lookedFor) != 0 || !strings.Contains(got.stdout, "4c6e1d2f") {
		t.Errorf("weir workloads c: %+v after looks at %v, want the agent's view and no look", got, n.lookedFor)
	}
}

// Who holds the programs of others takes a walk through all processes and links, so it
// is asked for where it is shown.
func TestOthersAreNamedWhereTheyAreShown(t *testing.T) {
	for _, tc := range []struct {
		args []string
		want bool
	}{{[]string{"status"}, false}, {[]string{"status", "-verbose"}, true}, {[]string{"status", "-json"}, true}} {
		n := &node{status: inspect.Status{Loaded: true, Others: []inspect.Other{{ID: 17}}}}
		if try(t, n, nil, tc.args...); n.named != tc.want {
			t.Errorf("weir %v: owners were asked for: %t, want %t", tc.args, n.named, tc.want)
		}
	}
}
