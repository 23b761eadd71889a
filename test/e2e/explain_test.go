// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/test"
)

// What explain says of a connection, with what Consul says of it, is what becomes of the same
// connection through real proxies.
func TestExplainOfTheMesh(t *testing.T) {
	n := newMeshNode(t, false)
	n.config.Gate = &configfile.GateConfig{Timeout: "0s"} // who does not listen is not waited for
	n.runAgent()
	weir := n.buildCLI()
	servers := make(map[string]*test.ServerProcess)
	for i, name := range []string{"api", "secret"} {
		a := n.allocate("")
		a.startEnvoy(a.register(name, object{"Port": 20001 + i}))
		servers[name] = test.EchoProcess(t, a.spec(1000), "tcp4", "127.0.0.1:8080")
	}
	ill := n.allocate("")
	ill.register("ill", object{"Port": 20003}, object{"CheckID": "ill", "TTL": "1h", "Status": "critical"})
	n.consul.Put("/v1/config", object{"Kind": "service-intentions", "Name": "secret", "Sources": []object{{"Name": "shop", "Action": "deny"}}})
	transparent := func(name string, port int) (*meshAlloc, string) {
		a := n.allocate(fmt.Sprintf(`{"ProxyUserID":"101","ProxyInboundPort":%d,"ProxyOutboundPort":15001}`, port))
		return a, a.register(name, object{"Port": port, "Proxy": object{"Mode": "transparent"}})
	}
	shop, proxy := transparent("shop", 20004)
	shop.startEnvoy(proxy)
	mute, _ := transparent("mute", 20005)

	type answer struct {
		Verdict, Service, Intention string
		Refused                     bool
		Instances                   *api.Instances
		Unknown                     []api.Unknown
		Remedy                      string
	}
	one := api.Instances{Passing: 1, Total: 1}
	for _, tc := range []struct {
		what      string
		from      *meshAlloc
		service   string
		code      int
		verdict   bpfmap.Verdict
		intention api.Intention
		instances api.Instances
		says      string
	}{
		{"healthy", shop, "api", 0, bpfmap.Redirected, api.IntentionAllow, one, "Intention: Consul lets shop dial api.\nInstances: 1 of 1 passing"},
		{"denied by an intention", shop, "secret", 2, bpfmap.Redirected, api.IntentionDeny, one, "Intention: Consul denies shop the service secret, whose proxies refuse it."},
		{"without a healthy instance", shop, "ill", 2, bpfmap.Redirected, api.IntentionAllow, api.Instances{Total: 1}, "Instances: 0 of 1 passing"},
		{"whose proxy does not listen", mute, "api", 2, bpfmap.RefusedNoProxy, api.IntentionAllow, one, "connect-proxy-mute"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			target := tc.service + ":80"
			explain := func(more ...string) (stdout, stderr string, code int) {
				return weir.run(append(append([]string{"explain"}, more...), tc.from.id, target)...)
			}
			virtual := n.virtualIP(tc.service)
			test.Eventually(t, func() error { // the agent has to see the registration, Consul its alias check
				text, complaint, code := explain("-json")
				var got answer
				if err := json.Unmarshal([]byte(text), &got); err != nil {
					return fmt.Errorf("%w: %s", err, text)
				}
				if code != tc.code || got.Verdict != tc.verdict.String() || got.Refused != tc.verdict.Refused() || got.Service != tc.service || got.Intention != string(tc.intention) ||
					got.Instances == nil || *got.Instances != tc.instances || len(got.Unknown) > 0 || (got.Remedy == "") != (tc.code == 0) {
					return fmt.Errorf("code %d, %s: %s", code, complaint, text)
				}
				return nil
			}, "its explanation")
			if text, _, _ := explain(); !strings.Contains(text, tc.says) || !strings.Contains(text, " to "+virtual.String()+":80") {
				t.Errorf("explain says\n%s\nwant %q and the virtual IP %s", text, tc.says, virtual)
			}
			task, address := tc.from.newHeld(), virtual.String()+":80"
			switch {
			case tc.code == 0:
				wantServed(t, task, address, servers[tc.service].Name)
			case tc.verdict.Refused():
				if _, err := task.exchange(address); err == nil || !strings.Contains(err.Error(), syscall.ECONNREFUSED.Error()) {
					t.Errorf("dial: %v, want it refused", err)
				}
			default:
				wantRefused(t, task, address)
			}
		})
	}
}
