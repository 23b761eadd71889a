// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/catalog/failure"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/test"

	realconsul "github.com/weirmesh/weir/test/consul"
)

// A token that Consul revokes is told within five seconds, and another one in the
// file is used at once, whatever blocking query is open or however long Consul was
// not answering.
func TestTokenIsRevokedAndReplaced(t *testing.T) {
	t.Parallel()
	server := realconsul.Start(t, true)
	server.Put("/v1/acl/policy", object{"Name": "weir", "Rules": realconsul.DocumentedPolicy(t)})
	type token struct{ AccessorID, SecretID string }
	next := func() (made token) {
		server.Post("/v1/acl/token", object{"Policies": []object{{"Name": "weir"}}}, &made)
		return made
	}
	config := *configfile.DefaultConfig().Consul
	config.Address, config.TokenFile = server.Address, filepath.Join(t.TempDir(), "token")
	first := next()
	test.WriteFile(t, config.TokenFile, first.SecretID)
	watcher := runWatcher(t, config, func(f *catalog.Watcher) { f.Client.Read = catalog.DefaultTimeouts().Read })
	good := func(v catalog.Snapshot) bool { return v.InSync && !v.Hidden && v.Watch.What == "" && v.Bind.What == "" }
	eventuallyKnown(t, watcher, "the first token to be used", good)
	for range 3 { // each time the back-off is longer
		began := time.Now()
		server.Delete("/v1/acl/token/" + first.AccessorID)
		eventuallyKnown(t, watcher, "the revoked token to be told", func(v catalog.Snapshot) bool { return !v.InSync })
		if took := time.Since(began); took > 15*time.Second {
			t.Errorf("told after %s, want after a few seconds: the next read is minutes away", took)
		}
		first = next()
		began = time.Now()
		test.WriteFile(t, config.TokenFile, first.SecretID)
		eventuallyKnown(t, watcher, "the new token to be used", good)
		if took := time.Since(began); took > 15*time.Second {
			t.Errorf("used after %s, want at once", took)
		}
	}
}

// Everything that the agent asks is answered to a token of the documented policy,
// and the remedies and the configuration name no other one.
func TestLeastPolicyOfTheToken(t *testing.T) {
	t.Parallel()
	server := realconsul.Start(t, true)
	rules := realconsul.DocumentedPolicy(t)
	server.Put("/v1/acl/policy", object{"Name": "weir", "Rules": rules})
	var token struct{ SecretID string }
	server.Post("/v1/acl/token", object{"Policies": []object{{"Name": "weir"}}}, &token)
	server.Register(object{"Name": "web", "ID": "web", "Port": 8080, "Check": object{"Name": "up", "TTL": "1m"}, "Connect": object{"SidecarService": object{"Port": 20001}}})
	server.Put("/v1/config", object{"Kind": "service-intentions", "Name": "web", "Sources": []object{{"Name": "api", "Action": "allow"}}})
	server.Put("/v1/config", object{"Kind": "ingress-gateway", "Name": "ingress", "Listeners": []object{
		{"Port": 9090, "Protocol": "tcp", "Services": []object{{"Name": "web"}}}}})
	config := *configfile.DefaultConfig().Consul
	config.Address, config.Token = server.Address, token.SecretID
	consul, err := catalog.NewClient(config, catalog.DefaultTimeouts())
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	for what, ask := range map[string]func() (bool, error){
		"the services of the node": func() (bool, error) {
			got, err := consul.Services(ctx)
			return strings.Contains(string(got.Body), "web-sidecar-proxy") && !got.Hidden, err
		},
		"its name":               func() (bool, error) { got, err := consul.Self(ctx); return got.Node == "node", err },
		"that something changed": func() (bool, error) { got, err := consul.Changed(ctx, "node", 0); return got > 0, err },
		"virtual IPs": func() (bool, error) {
			got, err := consul.VirtualIPs(ctx, registration.Service{Name: "web"})
			return len(got) == 1, err
		},
		"intentions": func() (bool, error) { got, err := consul.Intentions(ctx); return len(got) == 1, err },
		"a gateway's listener": func() (bool, error) {
			got, err := consul.GatewayPorts(ctx, registration.Gateway{Service: registration.Service{Name: "ingress"}, Kind: registration.KindIngress})
			return len(got) == 1, err
		},
		"checks":                func() (bool, error) { _, err := consul.Checks(ctx); return err == nil, err },
		"that the token is one": func() (bool, error) { return !consul.Revoked(ctx), nil },
	} {
		test.Eventually(t, func() error { // Consul gives the virtual IP a moment after the registration
			answered, err := ask()
			if err == nil && !answered {
				err = errors.New("the answer lacks it")
			}
			return err
		}, what+" to be told")
	}

	shipped, err := os.ReadFile("../deploy/weir.d/weir.hcl")
	if err != nil {
		t.Fatal(err)
	}
	words := func(text string) string { return strings.Join(strings.Fields(strings.ReplaceAll(text, "#", "")), " ") }
	for where, text := range map[string]string{
		"the remedy of a 403": failure.Problem(api.StatusError{Code: http.StatusForbidden}).Remedy, "deploy/weir.d/weir.hcl": string(shipped),
	} {
		for rule := range strings.Lines(strings.ReplaceAll(rules, `"node"`, `"NODE"`)) {
			if !strings.Contains(words(text), words(rule)) {
				t.Errorf("%s does not have %s", where, rule)
			}
		}
		if strings.Contains(text, "agent_prefix") || strings.Contains(text, "intentions =") {
			t.Errorf("%s names more than is needed: %s", where, text)
		}
	}
}
