// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/catalog/behind"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	realconsul "github.com/weirmesh/weir/test/consul"
)

// lookBehind asks as an agent does that shows one workload with the sidecar of web, whose upstream is db.
func lookBehind(t *testing.T, server *realconsul.Server, token string, query api.BehindQuery) api.Behind {
	t.Helper()
	config := *configfile.DefaultConfig().Consul
	config.Address, config.Token = server.Address, token
	consul, err := catalog.NewClient(config, catalog.DefaultTimeouts())
	if err != nil {
		t.Fatal(err)
	}
	db := registration.Service{Name: "db"}
	known := catalog.Snapshot{Proxies: map[string][]registration.Proxy{"": {{ID: "web-proxy", Kind: registration.KindSidecar, Service: "web", Outbound: 15001,
		Upstreams: []registration.Upstream{{Of: db, Listener: netip.MustParseAddrPort("127.0.0.1:9191")},
			{Of: registration.Service{Name: "far"}, Listener: netip.MustParseAddrPort("127.0.0.1:9192"), Remote: true}}}}}}
	known.Facts.VirtualIPs = map[registration.Service][]netip.Addr{db: test.Addrs("240.0.0.5")}
	workloads := []api.WorkloadView{{Key: behindKey(), State: api.StateManaged, Proxies: []api.ProxyView{{ID: "web-proxy", Kind: registration.KindSidecar}}}}
	return behind.Ask(t.Context(), consul, known, workloads, query)
}

func behindKey() workload.AttachmentID {
	return workload.AttachmentID{ContainerID: "0b5d", IfName: "eth0"}
}

// What Consul says of a service is told as Consul has it: its intentions by precedence, and its
// instances by their checks.
func TestBehindIsConsulsOwnAnswer(t *testing.T) {
	t.Parallel()
	server := realconsul.Start(t, true)
	for i, status := range []string{"passing", "warning", "critical"} {
		server.Register(object{"Name": "db", "ID": fmt.Sprint("db", i), "Port": 5432 + i, "Check": object{"CheckID": fmt.Sprint("db", i), "TTL": "1h", "Status": status},
			"Connect": object{"SidecarService": object{"Port": 21000 + i, "Checks": []object{{"Name": "its service", "AliasService": fmt.Sprint("db", i)}}}}})
	}
	server.Put("/v1/acl/policy", object{"Name": "weir", "Rules": realconsul.DocumentedPolicy(t)})
	var token struct{ SecretID string }
	server.Post("/v1/acl/token", object{"Policies": []object{{"Name": "weir"}}}, &token)
	byAddress := api.BehindQuery{Key: behindKey(), To: netip.MustParseAddrPort("240.0.0.5:5432"), SentTo: netip.MustParseAddrPort("127.0.0.1:15001")}
	byListener := api.BehindQuery{Key: behindKey(), To: netip.MustParseAddrPort("127.0.0.1:9191")}
	byName := api.BehindQuery{Key: behindKey(), To: netip.MustParseAddrPort("198.51.100.7:80"), Service: "db"}
	intentions := func(sources ...object) {
		if len(sources) == 0 {
			server.Delete("/v1/config/service-intentions/db")
			return
		}
		server.Put("/v1/config", object{"Kind": "service-intentions", "Name": "db", "Sources": sources})
	}
	server.Put("/v1/config", object{"Kind": "service-defaults", "Name": "db", "Protocol": "http"}) // permissions are of HTTP
	for _, tc := range []struct {
		name    string
		sources []object
		want    api.Intention
	}{
		{"denied by default", nil, api.IntentionDeny}, // as the ACLs are
		{"allowed", []object{{"Name": "web", "Action": "allow"}}, api.IntentionAllow},
		{"allowed to all", []object{{"Name": "*", "Action": "allow"}}, api.IntentionAllow},
		{"denied beside all others", []object{{"Name": "*", "Action": "allow"}, {"Name": "web", "Action": "deny"}}, api.IntentionDeny},
		{"allowed to another", []object{{"Name": "api", "Action": "allow"}}, api.IntentionDeny},
		{"some requests", []object{{"Name": "web", "Permissions": []object{{"Action": "allow", "HTTP": object{"PathPrefix": "/public"}}}}}, api.IntentionByRequest},
	} {
		t.Run(tc.name, func(t *testing.T) {
			intentions(tc.sources...)
			want := api.Behind{Schema: 1, Service: "db", Source: "web", Intention: tc.want, Instances: &api.Instances{Passing: 1, Warning: 1, Total: 3}, VirtualIPs: []netip.Addr{}, Unknown: []api.Unknown{}}
			for _, query := range []api.BehindQuery{byAddress, byListener, byName} {
				test.Eventually(t, func() error { // the answer may be of a moment ago
					if diff := cmp.Diff(want, lookBehind(t, server, token.SecretID, query)); diff != "" {
						return fmt.Errorf("%+v (-want +got):\n%s", query, diff)
					}
					return nil
				}, "Consul's answer")
			}
		})
	}
	test.Eventually(t, func() error {
		if got := lookBehind(t, server, token.SecretID, api.BehindQuery{Key: behindKey(), Service: "db"}); len(got.VirtualIPs) != 1 || len(got.Unknown) > 0 {
			return fmt.Errorf("got %+v", got)
		}
		return nil
	}, "its virtual IP by its name")
	for name, query := range map[string]api.BehindQuery{
		"of no service":           {Key: behindKey(), To: netip.MustParseAddrPort("198.51.100.7:80"), SentTo: netip.MustParseAddrPort("127.0.0.1:15001")},
		"of no workload":          {To: netip.MustParseAddrPort("240.0.0.5:5432")},
		"of another datacenter's": {Key: behindKey(), To: netip.MustParseAddrPort("127.0.0.1:9192")},
	} {
		if got := lookBehind(t, server, token.SecretID, query); got.Intention != "" || got.Instances != nil || (len(got.Unknown) > 0) != (got.Service == "far") {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// What the token may not read is told as not looked at, with the right that it lacks, and is no
// denial and no absence.
func TestBehindWhatTheTokenMayNotRead(t *testing.T) {
	t.Parallel()
	server := realconsul.Start(t, true)
	server.Register(object{"Name": "db", "ID": "db", "Port": 5432, "Connect": object{"SidecarService": object{"Port": 21000}}})
	server.Put("/v1/config", object{"Kind": "service-intentions", "Name": "db", "Sources": []object{{"Name": "web", "Action": "allow"}}})
	query := api.BehindQuery{Key: behindKey(), To: netip.MustParseAddrPort("127.0.0.1:9191")}
	for _, tc := range []struct {
		name, rules string
		unknown     map[string]string // what, and the right that the remedy names
	}{
		{"no service", `service "web" { policy = "read" }`, map[string]string{"intention": `service_prefix ""`, "instances": `service_prefix ""`}},
		{"no node", `service_prefix "" { policy = "read" }`, map[string]string{"instances": `node_prefix ""`}},
		{"no intentions", `service_prefix "" { policy = "read" intentions = "deny" } node_prefix "" { policy = "read" }`, map[string]string{}},
		{"anonymous", "", map[string]string{"intention": `service_prefix ""`, "instances": `node_prefix ""`}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var token struct{ SecretID string }
			if tc.rules != "" {
				server.Put("/v1/acl/policy", object{"Name": strings.ReplaceAll(tc.name, " ", "-"), "Rules": tc.rules})
				server.Post("/v1/acl/token", object{"Policies": []object{{"Name": strings.ReplaceAll(tc.name, " ", "-")}}}, &token)
			}
			got := lookBehind(t, server, token.SecretID, query)
			for _, unknown := range got.Unknown {
				if right, want := tc.unknown[unknown.What]; !want || !strings.Contains(unknown.Remedy, right) {
					t.Errorf("not looked at: %+v, want %v", unknown, tc.unknown)
				}
			}
			_, noIntention := tc.unknown["intention"]
			_, noInstances := tc.unknown["instances"]
			if len(got.Unknown) != len(tc.unknown) || (got.Intention == "") != noIntention || (got.Instances == nil) != noInstances || got.Intention == api.IntentionDeny {
				t.Errorf("got %+v, want unknown %v", got, tc.unknown)
			}
		})
	}
	server.Stop()
	got := lookBehind(t, server, "", query)
	if len(got.Unknown) != 2 || !strings.Contains(got.Unknown[0].Remedy, "whether Consul's agent runs") {
		t.Errorf("without Consul: %+v", got)
	}
}

// The CLI's question goes by the socket, and an agent that does not ask Consul says so.
func TestBehindByTheSocket(t *testing.T) {
	n := newNode(t)
	n.config.Consul.Enabled = false
	n.run()
	var got api.Behind
	test.Eventually(t, func() (err error) {
		got, err = api.ReadBehind(t.Context(), n.config.StateDir, api.BehindQuery{Key: behindKey(), To: netip.MustParseAddrPort("240.0.0.5:80")})
		return err
	}, "an answer")
	if got.Schema != 1 || len(got.Unknown) != 1 || got.Unknown[0].What != "consul" || got.Intention != "" {
		t.Errorf("got %+v", got)
	}
	before := t.TempDir()
	listener, err := net.Listen("unix", filepath.Join(before, api.SocketName))
	if err != nil {
		t.Fatal(err)
	}
	old := &http.Server{Handler: http.NotFoundHandler()} // an agent of a version before
	go func() { _ = old.Serve(listener) }()
	t.Cleanup(func() { old.Close() })
	if _, err := api.ReadBehind(t.Context(), before, api.BehindQuery{}); !errors.Is(err, api.ErrNoBehind) || errors.Is(err, api.ErrFlowsOff) {
		t.Errorf("an agent that does not know the question: %v, want %v", err, api.ErrNoBehind)
	}
	if _, err := api.ReadBehind(t.Context(), t.TempDir(), api.BehindQuery{}); !errors.Is(err, api.ErrNotRunning) {
		t.Errorf("without an agent: %v", err)
	}
}
