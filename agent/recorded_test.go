// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/weirmesh/weir/agent/registration"

	realconsul "github.com/weirmesh/weir/test/consul"
)

// recordedFile has the answers of a real Consul to what recordings registers.
// WEIR_RECORD=1 go test ./agent -run TestRecordedAnswersAreARealConsuls writes
// them anew.
const recordedFile = "testdata/consul-1.22.2-entries.json"

type object = map[string]any

// recording is a state of Consul, and what the agent is to read of it: a line
// for each proxy. Together they have every kind of configuration entry of the
// free edition and every option of a proxy.
type recording struct {
	name     string
	entries  []object
	services []object
	want     []string
}

func sidecarOf(name string, proxy object) object {
	return object{"Name": name, "ID": name, "Port": 8080, "Connect": object{"SidecarService": object{"Port": 20001, "Proxy": proxy}}}
}

func recordings(t *testing.T) []recording {
	t.Helper()
	certificate, key := selfSigned(t)
	api := object{"DestinationName": "api", "LocalBindPort": 9191}
	central := []object{
		{"Kind": "proxy-defaults", "Name": "global", "MeshGateway": object{"Mode": "local"}, "Config": object{"protocol": "http"},
			"Expose": object{"Checks": true}, "AccessLogs": object{"Enabled": true}, "FailoverPolicy": object{"Mode": "sequential"}},
		{"Kind": "service-defaults", "Name": "web", "Protocol": "http", "UpstreamConfig": object{
			"Defaults":  object{"ConnectTimeoutMs": 3000, "MeshGateway": object{"Mode": "local"}, "Limits": object{"MaxConnections": 3}},
			"Overrides": []object{{"Name": "api", "ConnectTimeoutMs": 1000}, {"Name": "other", "Protocol": "http"}, {"Name": "away", "Peer": "dc2"}},
		}},
	}
	entries := func(list ...object) []object { return list }
	gateway := func(kind string, config object) object {
		return object{"Kind": kind, "Name": kind, "ID": kind, "Port": 8443, "Address": "127.0.0.1",
			"TaggedAddresses": object{"wan": object{"Address": "192.0.2.1", "Port": 9443}}, "Proxy": object{"Config": config}}
	}
	bound := object{"envoy_gateway_bind_addresses": object{"all": object{"Address": "0.0.0.0", "Port": 8444}},
		"envoy_gateway_no_default_bind": true, "envoy_dns_discovery_type": "STRICT_DNS", "envoy_gateway_remote_tcp_enable_keepalive": true}
	return []recording{
		{"central upstream defaults, in direct mode", central, []object{sidecarOf("web", object{"Upstreams": []object{api}})},
			[]string{"web-sidecar-proxy connect-proxy of web, direct, in 20001, local 8080, checks, api=127.0.0.1:9191"}},
		{"central upstream defaults, in transparent mode", central, []object{sidecarOf("web", object{"Mode": "transparent", "Upstreams": []object{api}})},
			[]string{"web-sidecar-proxy connect-proxy of web, transparent, in 20001, local 8080, checks, api=127.0.0.1:9191"}},
		{"the mode and every option of a sidecar from proxy-defaults",
			entries(object{"Kind": "mesh", "AllowEnablingPermissiveMutualTLS": true},
				object{"Kind": "proxy-defaults", "Name": "global", "Mode": "transparent", "MutualTLSMode": "permissive",
					"TransparentProxy": object{"OutboundListenerPort": 15009, "DialedDirectly": true},
					"Expose":           object{"Paths": []object{{"Path": "/health", "ListenerPort": 21500, "LocalPathPort": 8080, "Protocol": "http"}}},
					"EnvoyExtensions":  []object{{"Name": "builtin/lua", "Arguments": object{"ProxyType": "connect-proxy", "Listener": "inbound", "Script": "function f() end"}}},
					"Config": object{"envoy_prometheus_bind_addr": "0.0.0.0:9102", "envoy_stats_bind_addr": "0.0.0.0:9103", "bind_address": "0.0.0.0",
						"local_connect_timeout_ms": 1000, "max_inbound_connections": 7, "envoy_tracing_json": "{}", "envoy_stats_flush_interval": "10s"}}),
			[]object{sidecarOf("web", nil)},
			[]string{"web-sidecar-proxy connect-proxy of web, transparent, in 20001, out 15009, local 8080, open 9102 9103 21500"}},
		{"every option of an upstream", nil, []object{sidecarOf("web", object{
			"LocalServiceAddress": "127.0.0.1", "Config": object{"bind_port": 20009}, "MeshGateway": object{"Mode": "remote"}, "Upstreams": []object{
				api,
				{"DestinationName": "named", "DestinationNamespace": "default", "DestinationPartition": "default", "LocalBindPort": 9192, "LocalBindAddress": "127.0.0.2"},
				{"DestinationName": "far", "Datacenter": "dc9", "LocalBindPort": 9193, "MeshGateway": object{"Mode": "none"}},
				{"DestinationName": "peered", "DestinationPeer": "dc2", "LocalBindPort": 9194},
				{"DestinationName": "query", "DestinationType": "prepared_query", "LocalBindPort": 9195},
				{"DestinationName": "socket", "LocalBindSocketPath": "/tmp/upstream.sock", "LocalBindSocketMode": "0700"},
				{"DestinationName": "tuned", "LocalBindPort": 9196, "Config": object{"connect_timeout_ms": 1, "envoy_listener_json": "", "limits": object{"max_connections": 3}}},
			}})},
			[]string{"web-sidecar-proxy connect-proxy of web, direct, in 20009, local 8080, api=127.0.0.1:9191 named=127.0.0.2:9192 " +
				"far=127.0.0.1:9193 (remote) peered.dc2=127.0.0.1:9194 query=127.0.0.1:9195 (remote) tuned=127.0.0.1:9196"}},
		{"a service on a Unix socket", nil, []object{{"Name": "web", "ID": "web", "SocketPath": "/tmp/web.sock", "Connect": object{
			"SidecarService": object{"Port": 20001, "Proxy": object{"LocalServiceSocketPath": "/tmp/web.sock"}}}}},
			[]string{"web-sidecar-proxy connect-proxy of web, direct, in 20001"}},
		{"routes, splits, resolvers, intentions, tokens and exports",
			entries(object{"Kind": "service-defaults", "Name": "web", "Protocol": "http", "MaxInboundConnections": 5, "LocalConnectTimeoutMs": 5,
				"BalanceInboundConnections": "exact_balance",
				"Expose":                    object{"Paths": []object{{"Path": "/a", "ListenerPort": 21501, "LocalPathPort": 8080}}}, "TransparentProxy": object{"OutboundListenerPort": 15010}},
				object{"Kind": "service-defaults", "Name": "outside", "Protocol": "tcp", "Destination": object{"Addresses": []string{"192.0.2.9"}, "Port": 443}},
				object{"Kind": "service-resolver", "Name": "web", "ConnectTimeout": "3s", "Subsets": object{"v1": object{"Filter": "Service.Meta.v == 1"}}},
				object{"Kind": "service-splitter", "Name": "web", "Splits": []object{{"Weight": 100, "ServiceSubset": "v1"}}},
				object{"Kind": "service-router", "Name": "web", "Routes": []object{{"Match": object{"HTTP": object{"PathPrefix": "/x"}}}}},
				object{"Kind": "jwt-provider", "Name": "okta", "Issuer": "okta", "JSONWebKeySet": object{"Local": object{"JWKS": "eyJrZXlzIjpbXX0="}}},
				object{"Kind": "service-intentions", "Name": "web", "Sources": []object{{"Name": "api", "Action": "allow"}}},
				object{"Kind": "exported-services", "Name": "default", "Services": []object{{"Name": "web", "Consumers": []object{{"Peer": "dc2"}}}}},
				object{"Kind": "mesh", "TransparentProxy": object{"MeshDestinationsOnly": true}}),
			[]object{sidecarOf("web", object{"Mode": "transparent"})},
			[]string{"web-sidecar-proxy connect-proxy of web, transparent, in 20001, out 15010, local 8080, open 21501"}},
		{"gateways with their entries",
			entries(object{"Kind": "ingress-gateway", "Name": "ingress-gateway", "Listeners": []object{{"Port": 9090, "Protocol": "tcp", "Services": []object{{"Name": "web"}}}}},
				object{"Kind": "terminating-gateway", "Name": "terminating-gateway", "Services": []object{{"Name": "web"}}},
				object{"Kind": "inline-certificate", "Name": "cert", "Certificate": certificate, "PrivateKey": key},
				object{"Kind": "file-system-certificate", "Name": "files", "Certificate": "/etc/cert.pem", "PrivateKey": "/etc/key.pem"},
				object{"Kind": "api-gateway", "Name": "api-gateway", "Listeners": []object{{"Name": "l", "Port": 9191, "Protocol": "tcp"}, {"Name": "h", "Port": 9192, "Protocol": "http"}}},
				object{"Kind": "tcp-route", "Name": "t", "Services": []object{{"Name": "web"}}, "Parents": []object{{"Kind": "api-gateway", "Name": "api-gateway", "SectionName": "l"}}},
				object{"Kind": "http-route", "Name": "h", "Rules": []object{{"Services": []object{{"Name": "web"}}}}, "Parents": []object{{"Kind": "api-gateway", "Name": "api-gateway", "SectionName": "h"}}}),
			[]object{
				gateway("mesh-gateway", object{"envoy_gateway_bind_tagged_addresses": true}), gateway("ingress-gateway", bound),
				gateway("terminating-gateway", nil), gateway("api-gateway", nil),
			},
			[]string{"api-gateway api-gateway", "ingress-gateway ingress-gateway, open 8444",
				"mesh-gateway mesh-gateway, open 8443 9443", "terminating-gateway terminating-gateway, open 8443"}},
	}
}

// selfSigned is a certificate with its key, which no answer has.
func selfSigned(t *testing.T) (certificate, key string) {
	t.Helper()
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "weir.test"}, DNSNames: []string{"weir.test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	signed, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	text := func(kind string, data []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: data}))
	}
	return text("CERTIFICATE", signed), text("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(private))
}

// line is what the agent read of a proxy.
func line(p registration.Proxy) string {
	text := p.ID + " " + p.Kind
	add := func(format string, args ...any) { text += fmt.Sprintf(", "+format, args...) }
	if !p.IsGateway() {
		text += " of " + p.Service
		add("%s", map[bool]string{true: "transparent", false: "direct"}[p.Transparent])
		add("in %d", p.Inbound)
	}
	if p.Outbound != 0 {
		add("out %d", p.Outbound)
	}
	if p.Local != 0 {
		add("local %d", p.Local)
	}
	if len(p.Open) > 0 {
		add("open %s", strings.Trim(fmt.Sprint(p.Open), "[]"))
	}
	if p.ExposeCheck {
		add("checks")
	}
	var upstreams []string
	for _, u := range p.Upstreams {
		name := u.Of.Label()
		if u.Of.Namespace+u.Of.Partition != "" {
			name = u.Of.Partition + "/" + u.Of.Namespace + "/" + name
		}
		upstreams = append(upstreams, name+"="+u.Listener.String()+map[bool]string{true: " (remote)"}[u.Remote])
	}
	if len(upstreams) > 0 {
		add("%s", strings.Join(upstreams, " "))
	}
	for _, problem := range p.Problems {
		add("problem: %s", problem)
	}
	return text
}

// No field that the agent reads is known from Go structs alone: each of a real
// Consul's recorded answers is read as it is meant, without a problem.
func TestRecordedAnswers(t *testing.T) {
	recorded := readRecorded(t)
	for _, r := range recordings(t) {
		t.Run(r.name, func(t *testing.T) {
			proxies, problems, err := registration.ParseServices(recorded[r.name], registration.Loopback4())
			if err != nil || len(problems) > 0 {
				t.Fatalf("parse: %v, problems %q", err, problems)
			}
			var got []string
			for _, p := range proxies {
				got = append(got, line(p))
			}
			slices.Sort(got)
			if diff := cmp.Diff(r.want, got); diff != "" {
				t.Errorf("proxies (-want +got):\n%s", diff)
			}
		})
	}
}

func readRecorded(t *testing.T) map[string]json.RawMessage {
	t.Helper()
	data, err := os.ReadFile(recordedFile)
	if err != nil {
		t.Fatal(err)
	}
	var recorded map[string]json.RawMessage
	if err := json.Unmarshal(data, &recorded); err != nil {
		t.Fatal(err)
	}
	return recorded
}

// What is recorded is what the Consul on this machine answers.
func TestRecordedAnswersAreARealConsuls(t *testing.T) {
	t.Parallel()
	server := realconsul.Start(t, false)
	answers := make(map[string]any)
	for _, r := range recordings(t) {
		for _, entry := range r.entries {
			server.Put("/v1/config", entry)
		}
		for _, service := range r.services {
			server.Register(service)
		}
		var answer any
		server.Get(`/v1/agent/services?filter=Kind+!=+%22%22`, &answer)
		answers[r.name] = answer
		var all map[string]any
		server.Get("/v1/agent/services", &all)
		for id := range all {
			if !strings.HasSuffix(id, "-sidecar-proxy") { // those go with their service
				server.Deregister(id)
			}
		}
		for _, entry := range slices.Backward(r.entries) {
			name, _ := entry["Name"].(string)
			if name == "" {
				name = "mesh"
			}
			server.Delete(fmt.Sprintf("/v1/config/%s/%s", entry["Kind"], name))
		}
	}
	data, err := json.MarshalIndent(answers, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	if os.Getenv("WEIR_RECORD") != "" {
		if err := os.WriteFile(recordedFile, append(data, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var got map[string]any
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	want := make(map[string]any)
	for name, body := range readRecorded(t) {
		var value any
		if err := json.Unmarshal(body, &value); err != nil {
			t.Fatal(err)
		}
		want[name] = value
	}
	// Consul puts central upstreams in another order each time, and gives a gateway
	// its services' virtual IPs when it comes to it.
	unordered := cmpopts.SortSlices(func(a, b any) bool { return fmt.Sprint(a) < fmt.Sprint(b) })
	later := cmpopts.IgnoreMapEntries(func(key string, _ any) bool { return strings.HasPrefix(key, "consul-virtual:") })
	if diff := cmp.Diff(want, got, unordered, later); diff != "" {
		t.Errorf("Consul answers otherwise (-recorded +now): WEIR_RECORD=1 records it anew\n%s", diff)
	}
}
