// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/consul"
)

// aclToken is a token of Consul's.
type aclToken struct{ AccessorID, SecretID string }

// newToken makes a token with the policies of those names.
func (n *meshNode) newToken(policies ...string) (token aclToken) {
	n.t.Helper()
	list := []object{}
	for _, name := range policies {
		list = append(list, object{"Name": name})
	}
	n.consul.Post("/v1/acl/token", object{"Policies": list}, &token)
	return token
}

// A token that may not read the node is told from a node without proxies; one
// that is replaced is taken up without a restart; one that Consul revokes leaves
// the last good state as it is, and a connection that is open through both Envoys.
func TestConsulTokenIsReplacedAndRevoked(t *testing.T) {
	n := newMeshNode(t, true)
	rules := consul.DocumentedPolicy(t)
	n.consul.Put("/v1/acl/policy", object{"Name": "weir", "Rules": rules})
	n.config.Consul.TokenFile = filepath.Join(n.dir, "token")
	writeToken := func(token aclToken) {
		t.Helper()
		if err := os.WriteFile(n.config.Consul.TokenFile, []byte(token.SecretID), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	writeToken(n.newToken())
	apiAlloc, web, edge := n.allocate(""), n.allocate(""), n.allocate("")
	apiAlloc.startEnvoy(apiAlloc.register("api", object{"Port": 20001}))
	server := test.EchoProcess(t, apiAlloc.spec(1000), "tcp4", "127.0.0.1:8080")
	n.intend("api", "web", "allow")
	upstream := func(port int) (proxyID string) {
		return web.register("web", object{"Port": 20002, "Proxy": object{"Upstreams": []object{{"DestinationName": "api", "LocalBindPort": port}}}})
	}
	web.startEnvoy(upstream(9191))
	n.consul.Put("/v1/config", object{"Kind": "ingress-gateway", "Name": "ingress", "Listeners": []object{
		{"Port": 9090, "Protocol": "tcp", "Services": []object{{"Name": "api"}}}}})
	edge.registerGateway("ingress", "ingress", nil)
	n.runAgent()
	test.Eventually(t, func() error {
		if status, err := n.status(); err != nil || !status.Consul.InSync || !status.Consul.Hidden {
			return fmt.Errorf("consul is %+v, %v", status.Consul, err)
		}
		return nil
	}, "the weak token to be told")
	if _, err := apiAlloc.known(); !errors.Is(err, store.ErrUnknown) {
		t.Errorf("api = %v, want it unknown to a token that reads nothing", err)
	}

	// One that may read all but the agent itself: nothing tells of changes.
	n.consul.Put("/v1/acl/policy", object{"Name": "deaf", "Rules": strings.Replace(rules, `agent "node" { policy = "read" }`, "", 1)})
	writeToken(n.newToken("deaf"))
	test.Eventually(t, func() error {
		status := n.mustStatus(t)
		told := fmt.Sprint(status.Problems)
		if !status.Consul.InSync || status.Consul.Hidden || !strings.Contains(status.Consul.Watch, "403") || !strings.Contains(told, "the Consul watch is failing") {
			return fmt.Errorf("consul is %+v, problems %s", status.Consul, told)
		}
		return nil
	}, "the dead trigger to be told")

	// Everything that the agent asks for is allowed by the policy.
	first := n.newToken("weir")
	writeToken(first)
	apiAlloc.eventually("the new token to be used", func(o workload.MeshConfig) bool { return o.InboundPort == 20001 })
	web.eventually("the virtual IP", func(o workload.MeshConfig) bool { return len(o.Upstreams) == 1 })
	edge.eventually("the gateway's listener", func(o workload.MeshConfig) bool { return slices.Contains(o.ExposedPorts, 9090) })
	test.Eventually(t, func() error {
		status := n.mustStatus(t)
		if status.Consul.Hidden {
			return errors.New("services still count as hidden")
		}
		if len(status.Problems) > 0 {
			return fmt.Errorf("problems are %s", status.Problems)
		}
		for _, w := range status.Workloads {
			if !w.InSync || len(w.Problems) > 0 {
				return fmt.Errorf("%s has problems %q", w.ID, w.Problems)
			}
		}
		return nil
	}, "the new token to be told")

	virtual := netip.AddrPortFrom(n.virtualIP("api"), 80).String()
	task := web.newHeld()
	stillOpen := func() {
		t.Helper()
		if word, err := task.say("open", ""); err != nil || word != "still here" {
			t.Errorf("the open connection says %q, %v", word, err)
		}
	}
	web.wantPassed(t, task, virtual, server.Name, 9191)
	if greeting, err := task.say("open", virtual); err != nil || servedBy(greeting) != server.Name {
		t.Fatalf("dial of %s = %q, %v; want %q", virtual, greeting, err, server.Name)
	}
	n.consul.Delete("/v1/acl/token/" + first.AccessorID)
	upstream(9292)
	n.wantInSync(t, false)
	if status := n.mustStatus(t); !strings.Contains(status.Consul.Error, "ACL not found") {
		t.Errorf("error = %q, want Consul's own words", status.Consul.Error)
	}
	if known, err := web.known(); err != nil || len(known.MeshConfig.Upstreams) != 1 || known.MeshConfig.Upstreams[0].Listener.Port() != 9191 {
		t.Errorf("web's mesh configuration is %+v, %v; want the last good one", known.MeshConfig, err)
	}
	stillOpen()

	writeToken(n.newToken("weir"))
	n.wantInSync(t, true)
	web.eventually("what changed meanwhile", func(o workload.MeshConfig) bool {
		return len(o.Upstreams) == 1 && o.Upstreams[0].Listener.Port() == 9292
	})
	web.wantPassed(t, task, virtual, server.Name, 9292)
	stillOpen()
}

// A Consul whose API is HTTPS alone for all but this test, and asks for a
// certificate: what is missing is told in words, and nothing is learned without.
func TestConsulIsReachedByTLS(t *testing.T) {
	n := newMeshNode(t, true, consul.WithTLS())
	apiAlloc := n.allocate("")
	port := 20000
	good := *n.config.Consul
	good.Token, good.SSL, good.Address = n.consul.Token, true, n.consul.TLS.Address
	good.CAFile, good.CertFile, good.KeyFile = n.consul.TLS.CA, n.consul.TLS.Cert, n.consul.TLS.Key
	for _, c := range []struct {
		name string
		edit func()
		want string // what the agent says; empty: it is in sync
	}{
		{"no certificate of its own", func() { n.config.Consul.CertFile, n.config.Consul.KeyFile = "", "" }, "certificate required"},
		{"no CA", func() { n.config.Consul.CAFile = "" }, "signed by unknown authority"},
		{"another server's name", func() { n.config.Consul.ServerName = "server.dc2.consul" }, "not server.dc2.consul"},
		{"no TLS", func() { n.config.Consul.SSL = false }, "HTTP request to an HTTPS server"},
		{"all of it", func() {}, ""},
		{"the server's name", func() { n.config.Consul.ServerName = "server.dc1.consul" }, ""},
		{"by URL", func() { n.config.Consul.SSL, n.config.Consul.Address = false, "https://"+good.Address }, ""},
		{"not verified", func() { n.config.Consul.CAFile, n.config.Consul.VerifySSL = "", false }, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := good
			n.config.Consul = &config
			c.edit()
			port++
			apiAlloc.register("api", object{"Port": port})
			n.runAgent()
			defer n.stop()
			if c.want != "" {
				n.tellsOfConsul(c.want)
				if _, err := apiAlloc.known(); !errors.Is(err, store.ErrUnknown) {
					t.Errorf("api is %v, want it unknown", err)
				}
				return
			}
			apiAlloc.eventually("the registration", func(o workload.MeshConfig) bool { return o.InboundPort == uint16(port) })
			port++
			apiAlloc.register("api", object{"Port": port})
			apiAlloc.eventually("a change", func(o workload.MeshConfig) bool { return o.InboundPort == uint16(port) })
		})
	}
}

// tellsOfConsul waits until the agent says why it is not in sync.
func (n *meshNode) tellsOfConsul(want string) {
	n.t.Helper()
	test.Eventually(n.t, func() error {
		status, err := n.status()
		if err == nil && (status.Consul.InSync || !strings.Contains(status.Consul.Error, want)) {
			err = fmt.Errorf("in sync %v: %q, want %q", status.Consul.InSync, status.Consul.Error, want)
		}
		return err
	}, "the failure to be told")
}

// The agent takes new certificates up as they are replaced, file by file, and
// says meanwhile what is missing; also when Consul comes back with another
// authority, and what the former one signed is worth nothing. It is never restarted.
func TestConsulCertificatesAreReplaced(t *testing.T) {
	n := newMeshNode(t, true, consul.WithTLS())
	config := n.config.Consul
	config.Token, config.SSL, config.Address = n.consul.Token, true, n.consul.TLS.Address
	own := func(name string) string { return filepath.Join(n.dir, name) }
	config.CAFile, config.CertFile, config.KeyFile = own("ca.pem"), own("cert.pem"), own("key.pem")
	replace := func(file, by string) {
		t.Helper()
		data, err := os.ReadFile(by)
		if err == nil {
			err = os.WriteFile(file, data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	replaceAll := func() {
		t.Helper()
		replace(config.CAFile, n.consul.TLS.CA)
		replace(config.CertFile, n.consul.TLS.Cert)
		replace(config.KeyFile, n.consul.TLS.Key)
	}
	replaceAll()
	apiAlloc := n.allocate("")
	renew := func() {
		t.Helper()
		n.consul.Stop()
		n.consul.RenewTLS()
		n.consul.Restart()
	}
	renew()
	apiAlloc.register("api", object{"Port": 20001})
	n.runAgent()
	n.tellsOfConsul("signed by unknown authority")
	replace(config.CAFile, n.consul.TLS.CA)
	replace(config.CertFile, n.consul.TLS.Cert)
	n.tellsOfConsul("private key does not match public key")
	replace(config.KeyFile, n.consul.TLS.Key)
	n.wantInSync(t, true)
	apiAlloc.eventually("the registration", func(o workload.MeshConfig) bool { return o.InboundPort == 20001 })

	renew()
	apiAlloc.register("api", object{"Port": 20002})
	n.tellsOfConsul("signed by unknown authority")
	if known, err := apiAlloc.known(); err != nil || known.MeshConfig.InboundPort != 20001 {
		t.Errorf("api's mesh configuration is %+v, %v; want the last good one", known.MeshConfig, err)
	}
	replaceAll()
	n.wantInSync(t, true)
	apiAlloc.eventually("what changed meanwhile", func(o workload.MeshConfig) bool { return o.InboundPort == 20002 })
}
