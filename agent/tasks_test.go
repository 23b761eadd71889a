// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// The kernel takes the first that listens under the proxy's UID for the proxy.
// Where that is another task, which its scope tells, the agent takes it out, and
// it stays out; the proxy itself is learned when it listens.
func TestAgentTakesTheProxysPlaceFromAnotherTask(t *testing.T) {
	n := newNode(t)
	n.config.CgroupRoot = ""
	n.Datapath = redirect.New(n.config.Paths())
	id := numbered(1)
	ns, key := n.transparent(id)
	scopes := test.NewCgroup(t)
	task, proxy := scopes.Child(t, id+".app.scope"), scopes.Child(t, id+".connect-proxy-web.scope")
	n.fake.answers(say(200, fmt.Sprintf(`{"_nomad-task-%s-group-g-web-80-sidecar-proxy":{"Kind":"connect-proxy","Service":"web-sidecar-proxy","Port":20001}}`, id)))
	test.EchoProcess(t, test.Spec{NetNS: ns, Cgroup: task, UID: 101, GID: 101}, "tcp4", "127.0.0.1:15001")
	if got := n.cgroupOf(key); got != task.ID {
		t.Fatalf("the kernel took cgroup %d for the proxy, want the task's, %d", got, task.ID)
	}
	n.run()
	n.eventuallyTask(id, "app") // nothing says yet that it is not the proxy
	if got := n.cgroupOf(key); got != task.ID {
		t.Fatalf("the proxy's cgroup is %d, want the task's while nobody else can be it", got)
	}
	test.NewClient(t, test.Spec{NetNS: ns, Cgroup: proxy, UID: 101, GID: 101}) // it runs, and does not listen yet
	test.Eventually(t, func() error {
		if got := n.cgroupOf(key); got != proxy.ID {
			return fmt.Errorf("the proxy's cgroup is %d", got)
		}
		return nil
	}, "the task to be ruled out, and the proxy to be known by its task")
	test.EchoProcess(t, test.Spec{NetNS: ns, Cgroup: proxy, UID: 101, GID: 101}, "tcp4", "0.0.0.0:20001")
	view := n.eventuallyTask(id, "connect-proxy-web")
	if !strings.Contains(fmt.Sprint(view.Problems), `"app"`) {
		t.Errorf("problems = %q, want the task named", view.Problems)
	}
	if _, err := n.Check(key, ""); err != nil {
		t.Error(err)
	}
	list, err := n.Workloads()
	if err != nil || len(list) != 1 || list[0].Proxy.Cgroup != proxy.ID || list[0].Proxy.Listeners != 1 {
		t.Errorf("workloads = %+v, %v; want the proxy's listener alone", list, err)
	}
}

func (n *node) cgroupOf(key workload.AttachmentID) uint64 {
	n.t.Helper()
	list, err := n.Workloads()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, w := range list {
		if w.Key == key {
			return w.Proxy.Cgroup
		}
	}
	n.t.Fatalf("no workload %s", key)
	return 0
}

func (n *node) eventuallyTask(id, task string) (found api.WorkloadView) {
	n.t.Helper()
	test.Eventually(n.t, func() error {
		for _, w := range n.agent.Status().Workloads {
			if found = w; w.ID == id && w.Task == task {
				return nil
			}
		}
		return errors.New("the agent does not show it")
	}, "the task of the proxy to be "+task)
	return found
}

func TestTaskOf(t *testing.T) {
	id, container := numbered(1), strings.Repeat("0a", 32)
	another := strings.Repeat("0c", 32)
	known := discover.Containers{
		Tasks:  map[string]string{container: "connect-proxy-api", another: "connect-proxy-web"},
		Allocs: map[string]string{container: id, another: numbered(2)},
	}
	for path, want := range map[string]string{
		"/nomad.slice/share.slice/" + id + ".connect-proxy-web.scope": "connect-proxy-web",
		"/nomad/" + id + ".web.v2":                                    "web.v2",
		"/nomad/" + numbered(2) + ".web":                              "",
		"/docker/" + container + "/init":                              "connect-proxy-api",
		"/docker/" + strings.Repeat("0b", 32):                         "",
		"/docker/" + another:                                          "",
		"/user.slice":                                                 "",
		// What somebody makes below the cgroup that is given to him.
		"/nomad.slice/share.slice/" + numbered(2) + ".app.scope/" + id + ".connect-proxy-web.scope": "",
		"/nomad.slice/share.slice/" + id + ".app.scope/" + id + ".connect-proxy-web.scope":          "app",
		"/docker/" + container + "/" + id + ".connect-proxy-web.scope":                              "connect-proxy-api",
		"/docker/" + another + "/docker/" + container:                                               "",
		"/" + id + "x.connect-proxy-web.scope":                                                      "",
		"/" + id + ".":                                                                              "",
	} {
		if got := discover.TaskOf(path, id, known); got != want {
			t.Errorf("task of %s = %q, want %q", path, got, want)
		}
	}
}

func TestInjectedTasks(t *testing.T) {
	sidecar := registration.Proxy{Kind: registration.KindSidecar, Self: registration.Service{Name: "web-sidecar-proxy"}}
	for _, c := range []struct {
		task string
		of   registration.Proxy
		want bool
	}{
		{"connect-proxy-web", sidecar, true},
		{"connect-proxy-web-1a2b3c", sidecar, true},
		{"connect-proxy-website", sidecar, false},
		{"connect-proxy-web-helper", sidecar, false},
		{"connect-proxy-web-1a2b3c4", sidecar, false},
		{"connect-proxy-web-1a2b3", sidecar, false},
		{"web", sidecar, false},
		{"connect-ingress-edge", registration.Proxy{Kind: registration.KindIngress, Self: registration.Service{Name: "edge"}}, true},
		{"edge", registration.Proxy{Kind: registration.KindAPI, Self: registration.Service{Name: "edge"}}, false},
	} {
		if got := registration.Injected(c.task, []registration.Proxy{c.of}); got != c.want {
			t.Errorf("task %s of a %s is the proxy's: %v, want %v", c.task, c.of.Kind, got, c.want)
		}
	}
}
