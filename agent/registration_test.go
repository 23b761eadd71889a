// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/workload"
)

func sameAddrs() cmp.Option { return cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}) }

// What a real Consul 1.22.2 answered, recorded with the agent's own filter.
func TestParseServicesOfARealConsul(t *testing.T) {
	body, err := os.ReadFile("testdata/consul-1.22.2-services.json")
	if err != nil {
		t.Fatal(err)
	}
	got, problems, err := registration.ParseServices(body, registration.Loopback4())
	if err != nil || len(problems) > 0 {
		t.Fatalf("parse = %v, problems %v", err, problems)
	}
	const web = "_nomad-task-11111111-2222-3333-4444-555555555555-group-web-web-8080"
	const gateway = "_nomad-task-22222222-2222-3333-4444-555555555555-group-gw-gw-wan"
	const db = "_nomad-task-33333333-2222-3333-4444-555555555555-group-db-db-5432"
	want := []registration.Proxy{
		{
			ID: web + "-sidecar-proxy", Kind: registration.KindSidecar, AllocID: "11111111-2222-3333-4444-555555555555",
			Self: registration.Service{Name: "web-sidecar-proxy"}, ServiceID: web, Service: "web", Local: 20000, Inbound: 20001, Open: []uint16{9102, 21500},
			Upstreams: []registration.Upstream{{Of: registration.Service{Name: "api"}, Listener: netip.MustParseAddrPort("127.0.0.1:9191")}},
		},
		{
			ID: gateway, Kind: registration.KindMesh, AllocID: "22222222-2222-3333-4444-555555555555", Address: netip.MustParseAddr("10.1.1.1"),
			Self: registration.Service{Name: "gw"}, Open: []uint16{8443, 8444}, Guard: workload.GuardEnforce,
		},
		{
			ID: db + "-sidecar-proxy", Kind: registration.KindSidecar, AllocID: "33333333-2222-3333-4444-555555555555",
			Self: registration.Service{Name: "db-sidecar-proxy"}, ServiceID: db, Service: "db", Local: 5432, Transparent: true, Inbound: 25000, Outbound: 15009, ExposeCheck: true,
			Upstreams: []registration.Upstream{
				{Of: registration.Service{Name: "cache"}, Listener: netip.MustParseAddrPort("127.0.0.1:6379")},
				{Of: registration.Service{Name: "far"}, Listener: netip.MustParseAddrPort("127.0.0.1:7000"), Remote: true},
			},
			Problems: []string{
				"upstream odd: local bind address 192.0.2.1 is not a loopback address",
				`meta weir-guard = "everything": want off, audit or enforce`,
			},
		},
		{ID: "api-sidecar-proxy", Kind: registration.KindSidecar, Self: registration.Service{Name: "api-sidecar-proxy"}, ServiceID: "api", Service: "api", Local: 8081, Inbound: 21000},
	}
	if diff := cmp.Diff(want, got, sameAddrs()); diff != "" {
		t.Errorf("proxies (-want +got):\n%s", diff)
	}
}

func TestParseServicesKeepsWhatCanBeRead(t *testing.T) {
	const body = `{
		"bad": {"Kind": "connect-proxy", "Port": "a lot"},
		"good": {"Kind": "connect-proxy", "Port": 70000, "Proxy": {"Config": {"bind_port": "20001"}}},
		"none": {"Kind": "connect-proxy", "Port": -1},
		"other": {"Kind": "typical"}
	}`
	got, problems, err := registration.ParseServices([]byte(body), registration.Loopback4())
	if err != nil {
		t.Fatal(err)
	}
	want := []registration.Proxy{
		{ID: "good", Kind: registration.KindSidecar, Inbound: 20001},
		{ID: "none", Kind: registration.KindSidecar, Problems: []string{"its registration names no port"}},
	}
	if diff := cmp.Diff(want, got, sameAddrs()); diff != "" {
		t.Errorf("proxies (-want +got):\n%s", diff)
	}
	if len(problems) != 1 || !strings.Contains(problems[0], "bad") {
		t.Errorf("problems = %q, want one that names the registration bad", problems)
	}
}

func TestParseServicesRefusesWhatIsNoAnswer(t *testing.T) {
	for _, body := range []string{"", "null", "[]", `"x"`, "<html>", `{"a":`} {
		if got, _, err := registration.ParseServices([]byte(body), registration.Loopback4()); err == nil {
			t.Errorf("parse of %q = %v, want an error", body, got)
		}
	}
}

func TestGatewaysListenOnTheirDefaultPortUnlessToldNotTo(t *testing.T) {
	const body = `{
		"a": {"Kind": "ingress-gateway", "Service": "in", "Port": 8443},
		"b": {"Kind": "terminating-gateway", "Service": "out", "Port": 8443, "Proxy": {"Config": {"envoy_gateway_no_default_bind": true}}},
		"c": {"Kind": "mesh-gateway", "Service": "mesh", "Port": 8443, "TaggedAddresses": {"wan": {"Port": 9443}},
		      "Proxy": {"Config": {"envoy_gateway_bind_tagged_addresses": true}}},
		"d": {"Kind": "api-gateway", "Service": "api", "Port": 8443},
		"e": {"Kind": "api-gateway", "Service": "api", "Port": 8443, "TaggedAddresses": {"lan": {"Port": 8443}},
		      "Proxy": {"Config": {"envoy_gateway_no_default_bind": true, "envoy_gateway_bind_tagged_addresses": true}}}
	}`
	got, _, err := registration.ParseServices([]byte(body), registration.Loopback4())
	if err != nil {
		t.Fatal(err)
	}
	var ports [][]uint16
	for _, p := range got {
		ports = append(ports, p.Open)
	}
	if diff := cmp.Diff([][]uint16{{8443}, nil, {8443, 9443}, nil, nil}, ports); diff != "" {
		t.Errorf("ports (-want +got):\n%s", diff)
	}
}

func TestAllocIDComesFromNomadsServiceIDs(t *testing.T) {
	const id = "b412a0b1-e285-703a-01ba-3d1b2e2228f7"
	for text, want := range map[string]string{
		"_nomad-task-" + id + "-group-g-api-9001":               id,
		"_nomad-task-" + id + "-group-g-api-9001-sidecar-proxy": id,
		"_nomad-task-" + id:                                     "",
		"_nomad-task-" + id + "x-group":                         "",
		"_nomad-task-../../../../../../etc/passwd-------group":  "",
		"_nomad-client-xyz":                                     "",
		"":                                                      "",
	} {
		if got := registration.AllocID(text); got != want {
			t.Errorf("allocID(%q) = %q, want %q", text, got, want)
		}
	}
}

// An agent that is bound to IPv6 puts listeners without an address on ::1.
func TestListenersWithoutAnAddressAreOnTheAgentsFamily(t *testing.T) {
	const body = `{"a": {"Kind": "connect-proxy", "Port": 1, "Proxy": {"Upstreams": [
		{"DestinationName": "open", "LocalBindPort": 9191}, {"DestinationName": "named", "LocalBindPort": 9292, "LocalBindAddress": "127.0.0.1"}]}}}`
	got, _, err := registration.ParseServices([]byte(body), netip.IPv6Loopback())
	if err != nil {
		t.Fatal(err)
	}
	want := []registration.Upstream{to("open", "[::1]:9191"), to("named", "127.0.0.1:9292")}
	if diff := cmp.Diff(want, got[0].Upstreams, sameAddrs()); diff != "" {
		t.Errorf("upstreams (-want +got):\n%s", diff)
	}
}
