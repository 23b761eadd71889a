// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/catalog/preflight"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/readiness"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"

	realconsul "github.com/weirmesh/weir/test/consul"
)

// results are those by code, and all that is said of what is not ok.
func results(t *testing.T, checks []health.Check) (results map[string]health.Result, says string) {
	t.Helper()
	results = make(map[string]health.Result)
	for _, check := range checks {
		if (check.Remedy == "") != (check.Result == health.ResultOK) {
			t.Errorf("check %+v: want a remedy where it is not ok", check)
		}
		results[check.Code] = check.Result
		if check.Result != health.ResultOK {
			says += check.What + "\n"
		}
	}
	return results, says
}

// Each right of the token is asked for with the question that needs it.
func TestReadinessOfTheToken(t *testing.T) {
	t.Parallel()
	server := realconsul.Start(t, true)
	server.Register(object{"Name": "web", "ID": "web", "Port": 8080, "Connect": object{"SidecarService": object{"Port": 20001}}})
	rules := realconsul.DocumentedPolicy(t)
	without := func(kind string) string {
		var kept []string
		for line := range strings.Lines(rules) {
			if !strings.HasPrefix(line, kind) {
				kept = append(kept, line)
			}
		}
		if strings.Join(kept, "") == rules {
			t.Fatalf("the documented policy has no rule for %s", kind)
		}
		return strings.Join(kept, "")
	}
	good := func() map[string]health.Result {
		return map[string]health.Result{
			"consul-address": health.ResultOK, "consul-leader": health.ResultOK, "consul-clock": health.ResultOK, "consul-version": health.ResultOK,
			"consul-token-agent": health.ResultOK, "consul-token-services": health.ResultOK, "consul-token-node": health.ResultOK,
		}
	}
	for _, c := range []struct {
		name, rules string
		change      func(want map[string]health.Result)
	}{
		{"documented", rules, func(map[string]health.Result) {}},
		{"agent", without("agent "), func(want map[string]health.Result) {
			want["consul-token-agent"] = health.ResultFault
			delete(want, "consul-version")
			delete(want, "consul-token-node") // the name of the node is not known
		}},
		{"node", without("node "), func(want map[string]health.Result) { want["consul-token-node"] = health.ResultFault }},
		{"services", without("service_prefix "), func(want map[string]health.Result) {
			want["consul-token-services"] = health.ResultFault
			delete(want, "consul-token-node") // the services of the node are left out of it as well
		}},
		{"unknown", "", func(want map[string]health.Result) {
			want["consul-token"] = health.ResultFault
			for _, code := range []string{"consul-token-agent", "consul-token-services", "consul-token-node", "consul-version"} {
				delete(want, code)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			token := struct{ SecretID string }{"12345678-1234-1234-1234-123456789012"}
			if c.rules != "" {
				server.Put("/v1/acl/policy", object{"Name": c.name, "Rules": c.rules})
				server.Post("/v1/acl/token", object{"Policies": []object{{"Name": c.name}}}, &token)
			}
			config := *configfile.DefaultConfig().Consul
			config.Address, config.Token = server.Address, token.SecretID
			checks, services := preflight.Consul(t.Context(), config)
			want := good()
			c.change(want)
			got, says := results(t, checks)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("results (-want +got):\n%s%s", diff, says)
			}
			if c.name == "documented" && !strings.Contains(string(services), "web-sidecar-proxy") {
				t.Errorf("services = %s", services)
			}
		})
	}
}

// What keeps Consul from answering at all is named for what it is.
func TestReadinessOfConsulsAddress(t *testing.T) {
	t.Parallel()
	server := realconsul.Start(t, false, realconsul.WithTLS())
	other := filepath.Join(t.TempDir(), "ca.pem")
	certificate, _ := selfSigned(t)
	test.WriteFile(t, other, certificate)
	for _, c := range []struct {
		name   string
		change func(config *configfile.ConsulConfig)
		code   string
		want   health.Result
		says   string
	}{
		{"plain", func(*configfile.ConsulConfig) {}, "consul-address", health.ResultOK, ""},
		{"mutual TLS", func(config *configfile.ConsulConfig) {
			config.Address, config.SSL = server.TLS.Address, true
			config.CAFile, config.CertFile, config.KeyFile, config.ServerName = server.TLS.CA, server.TLS.Cert, server.TLS.Key, "localhost"
		}, "consul-tls", health.ResultOK, ""},
		{"not verified", func(config *configfile.ConsulConfig) {
			config.Address, config.SSL, config.VerifySSL = server.TLS.Address, true, false
			config.CertFile, config.KeyFile = server.TLS.Cert, server.TLS.Key
		}, "consul-tls", health.ResultWarning, "not verified"},
		{"no client certificate", func(config *configfile.ConsulConfig) {
			config.Address, config.SSL, config.CAFile, config.ServerName = server.TLS.Address, true, server.TLS.CA, "localhost"
		}, "consul-tls", health.ResultFault, "certificate"},
		{"another authority", func(config *configfile.ConsulConfig) {
			config.Address, config.SSL, config.CAFile, config.ServerName = server.TLS.Address, true, other, "localhost"
		}, "consul-tls", health.ResultFault, "unknown authority"},
		{"no file", func(config *configfile.ConsulConfig) {
			config.Address, config.SSL, config.CAFile = server.TLS.Address, true, "/nowhere/ca.pem"
		}, "consul-tls", health.ResultFault, "/nowhere/ca.pem"},
		{"plain to TLS", func(config *configfile.ConsulConfig) { config.Address = server.TLS.Address }, "consul-tls", health.ResultFault, "HTTPS"},
		{"TLS to plain", func(config *configfile.ConsulConfig) { config.SSL = true }, "consul-tls", health.ResultFault, "HTTP"},
		{"nobody", func(config *configfile.ConsulConfig) { config.Address = "127.0.0.1:1" }, "consul-address", health.ResultFault, "connection refused"},
		{"no token file", func(config *configfile.ConsulConfig) { config.TokenFile = "/nowhere/token" }, "consul-token", health.ResultFault, "/nowhere/token"},
		{"not asked", func(config *configfile.ConsulConfig) { config.Enabled = false }, "consul-address", health.ResultWarning, "not asked"},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := *configfile.DefaultConfig().Consul
			config.Address = server.Address
			c.change(&config)
			checks, _ := preflight.Consul(t.Context(), config)
			if got, says := results(t, checks); got[c.code] != c.want || !strings.Contains(says, c.says) || c.want == health.ResultOK && says != "" {
				t.Errorf("%s = %s, want %s that says %q; all: %v\n%s", c.code, got[c.code], c.want, c.says, got, says)
			}
		})
	}
}

func TestReadinessOfTheClock(t *testing.T) {
	now := time.Date(2026, 11, 28, 0, 0, 0, 500_000_000, time.UTC)
	for _, c := range []struct {
		date string
		want []health.Result
	}{
		{"", nil},
		{now.Format(http.TimeFormat), []health.Result{health.ResultOK}},
		{now.Add(-9 * time.Second).Format(http.TimeFormat), []health.Result{health.ResultOK}},
		{now.Add(30 * time.Second).Format(http.TimeFormat), []health.Result{health.ResultWarning}},
		{now.Add(-30 * time.Second).Format(http.TimeFormat), []health.Result{health.ResultWarning}},
		{now.Add(-2 * time.Minute).Format(http.TimeFormat), []health.Result{health.ResultFault}},
		{now.Add(2 * time.Minute).Format(http.TimeFormat), []health.Result{health.ResultFault}},
	} {
		checks := &health.Checks{Group: "consul"}
		preflight.CheckClock(checks, c.date, now, now.Add(time.Millisecond))
		var got []health.Result
		for _, check := range checks.List {
			got = append(got, check.Result)
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("Date %q (-want +got):\n%s", c.date, diff)
		}
	}
}

// Allocations of the mesh without a record: what consul-cni redirected, what asked
// for Weir, and what only Consul has a proxy of. Others are none of ours.
func TestReadinessOfAllocations(t *testing.T) {
	n := newNode(t)
	const netns = "/proc/self/ns/net" // a namespace that is there
	n.cached(numbered(1), netns, `{"ProxyUserID":"101"}`)
	n.cached(numbered(2), netns, "")
	n.cached(numbered(3), netns, "") // not in the mesh
	n.cached(numbered(4), filepath.Join(t.TempDir(), "gone"), `{"ProxyUserID":"101"}`)
	n.cached(numbered(5), netns, `{"ProxyUserID":"101"}`) // under Weir
	n.resultOf(numbered(6), netns, `{"name":"nomad","plugins":[{"type":"weir"}]}`, [][2]string{{"weir.mode", "direct"}})
	answer := httptest.NewRecorder()
	registered(numbered(2))(answer, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil))
	known := []inspect.Record{{Key: workload.AttachmentID{ContainerID: numbered(5), IfName: "eth0"}}}
	for before, plain := range map[bool]health.Result{false: health.ResultFault, true: health.ResultOK} {
		got := make(map[string]health.Result)
		checks := readiness.Allocations(n.config, known, answer.Body.Bytes(), before)
		for _, check := range checks {
			for i := 1; i <= 6; i++ {
				if strings.Contains(check.What, numbered(i)) {
					got[check.Code+" "+numbered(i)[35:]] = check.Result
				}
			}
		}
		want := map[string]health.Result{
			"allocation-consul 1": health.ResultWarning, "allocation-unprotected 2": plain, "allocation-unprotected 6": plain,
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("before %t: results (-want +got):\n%s", before, diff)
		}
	}
	n.config.CNI.CacheDir = t.TempDir()
	checks := readiness.Allocations(n.config, nil, nil, false)
	if len(checks) != 1 || checks[0].Result != health.ResultOK {
		t.Errorf("a node without allocations: %+v", checks)
	}
}

// What was tested is what the tests' tools are built from.
func TestTestedVersionOfConsul(t *testing.T) {
	text, err := os.ReadFile("../test/tools/consul/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "github.com/hashicorp/consul "+preflight.TestedConsul+" ") {
		t.Errorf("test/tools/consul/go.mod does not have Consul %s", preflight.TestedConsul)
	}
}
