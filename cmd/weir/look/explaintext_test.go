// SPDX-License-Identifier: MPL-2.0

package look

import (
	"testing"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/workload"
)

// A remedy is to be pasted: it names the task whose log says why, as far as it is known.
func TestRemedyNamesTheProxysTask(t *testing.T) {
	const remedy, placeholder = "'nomad alloc logs 0b5d0c1e connect-proxy-SERVICE' says why", "connect-proxy-SERVICE"
	key := workload.AttachmentID{ContainerID: "0b5d0c1e", IfName: "eth0"}
	other := workload.AttachmentID{ContainerID: "1b5d0c1e", IfName: "eth0"}
	registered := []api.ProxyView{{ID: "web-sidecar-proxy", Task: "connect-proxy-web"}}
	for _, c := range []struct {
		name string
		view []api.WorkloadView
		want string
	}{
		{"no agent", nil, placeholder},
		{"another allocation", []api.WorkloadView{{Key: other, Task: "connect-proxy-api"}}, placeholder},
		{"not registered yet", []api.WorkloadView{{Key: key}}, placeholder},
		{"registered, never started", []api.WorkloadView{{Key: other}, {Key: key, Proxies: registered}}, "connect-proxy-web"},
		{"a task of the job's own", []api.WorkloadView{{Key: key, Task: "envoy", Proxies: registered}}, "envoy"},
		{"several listened", []api.WorkloadView{{Key: key, Task: "envoy, web", Proxies: registered}}, "connect-proxy-web"},
	} {
		if got, want := nameProxyTask(remedy, key, api.Status{Workloads: c.view}), "'nomad alloc logs 0b5d0c1e "+c.want+"' says why"; got != want {
			t.Errorf("%s: remedy = %q, want %q", c.name, got, want)
		}
	}
}
