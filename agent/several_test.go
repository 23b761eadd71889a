// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/workload"
)

func of(name string, inbound uint16, change ...func(*registration.Proxy)) registration.Proxy {
	return sidecar(append([]func(*registration.Proxy){func(p *registration.Proxy) {
		p.ID, p.Service, p.ServiceID, p.Inbound = name+"-proxy", name, name, inbound
	}}, change...)...)
}

func transparentAt(outbound, local uint16) func(*registration.Proxy) {
	return func(p *registration.Proxy) { p.Transparent, p.Outbound, p.Local = true, outbound, local }
}

// Whose is what, where a group has several sidecars.
func TestDesireOfSeveralSidecars(t *testing.T) {
	dials := func(source, destination string) registration.Intention {
		return registration.Intention{Source: registration.Service{Name: source}, Destination: registration.Service{Name: destination}}
	}
	known := catalog.Data{
		VirtualIPs: map[registration.Service][]netip.Addr{
			{Name: "db"}: addrs("240.0.0.1"), {Name: "cache"}: addrs("240.0.0.2"), {Name: "both"}: addrs("240.0.0.3"),
		},
		Intentions: []registration.Intention{dials("api", "both"), dials("web", "both"), dials("web", "db"), dials("api", "cache"), dials("other", "cache")},
	}
	second := workload.Sidecar{Service: "web", InboundPort: 20002, OutboundPort: 15002, ServicePorts: []uint16{8081}, VirtualIPs: addrs("240.0.0.1")}
	for name, c := range map[string]struct {
		mode    workload.Mode
		proxies []registration.Proxy
		want    workload.MeshConfig
		problem string
	}{
		"the first by the service's name, whatever the order": {
			mode:    workload.ModeTransparent,
			proxies: []registration.Proxy{of("web", 20002, transparentAt(15002, 8081)), of("api", 20001, transparentAt(0, 8080))},
			want:    workload.MeshConfig{InboundPort: 20001, Service: "api", Proxies: []workload.Sidecar{second}},
		},
		"one port for two services is the first one's": {
			mode:    workload.ModeTransparent,
			proxies: []registration.Proxy{of("api", 20001, transparentAt(15001, 8080)), of("web", 20002, transparentAt(15002, 8080))},
			want: workload.MeshConfig{InboundPort: 20001, OutboundPort: 15001, Service: "api", Proxies: []workload.Sidecar{
				{Service: "web", InboundPort: 20002, OutboundPort: 15002, VirtualIPs: addrs("240.0.0.1")}}},
		},
		"a plain sidecar beside a transparent one is not the first": {
			mode:    workload.ModeTransparent,
			proxies: []registration.Proxy{of("api", 20001), of("web", 20002, transparentAt(15001, 0))},
			want: workload.MeshConfig{InboundPort: 20002, OutboundPort: 15001, Service: "web", Proxies: []workload.Sidecar{
				{Service: "api", InboundPort: 20001}}},
		},
		"one outbound port for two proxies": {
			mode:    workload.ModeTransparent,
			proxies: []registration.Proxy{of("api", 20001, transparentAt(0, 0)), of("web", 20002, transparentAt(15001, 8081))},
			want: workload.MeshConfig{InboundPort: 20001, Service: "api", Proxies: []workload.Sidecar{
				{Service: "web", InboundPort: 20002, ServicePorts: []uint16{8081}}}},
			problem: "outbound listener of service web: port 15001 is that of service api already",
		},
		"one inbound port for two proxies": {
			mode:    workload.ModeDirect,
			proxies: []registration.Proxy{of("api", 20001), of("web", 20001)},
			want:    workload.MeshConfig{InboundPort: 20001, Service: "api"},
			problem: "inbound listener of service web: port 20001 is that of service api already",
		},
		"an upstream of both is the first proxy's": {
			mode: workload.ModeDirect,
			proxies: []registration.Proxy{
				of("web", 20002, func(p *registration.Proxy) { p.Upstreams = []registration.Upstream{to("db", "127.0.0.1:1")} }),
				of("api", 20001, func(p *registration.Proxy) { p.Upstreams = []registration.Upstream{to("db", "127.0.0.1:2")} }),
			},
			want: workload.MeshConfig{InboundPort: 20001, Service: "api", Proxies: []workload.Sidecar{{Service: "web", InboundPort: 20002}},
				Upstreams: []workload.Upstream{{Name: "db", Addresses: addrs("240.0.0.1"), Listener: netip.MustParseAddrPort("127.0.0.1:2")}}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := desired.Allocation{Attachment: discover.Attachment{Key: found().Key}, Record: onRecord(c.mode), Proxies: c.proxies}
			got := desired.For(s, known, desired.Policy{Guard: workload.GuardOff})
			c.want.Guard = workload.GuardOff
			if diff := cmp.Diff(&c.want, got.MeshConfig, sameAddrs()); diff != "" {
				t.Errorf("mesh configuration (-want +got):\n%s", diff)
			}
			if told := fmt.Sprint(got.Problems); c.problem == "" && told != "[]" || !strings.Contains(told, c.problem) {
				t.Errorf("problems %q, want %q", told, c.problem)
			}
			if err := workload.Merge(s.Record.Request, *got.MeshConfig).Validate(); err != nil {
				t.Errorf("the data path would refuse it: %v", err)
			}
		})
	}
}

func TestDesireOfTooManySidecars(t *testing.T) {
	s := desired.Allocation{Attachment: discover.Attachment{Key: found().Key}, Record: onRecord(workload.ModeDirect)}
	for i := range workload.MaxProxies + 1 {
		s.Proxies = append(s.Proxies, of(fmt.Sprintf("service-%d", i), uint16(20000+i)))
	}
	got := desired.For(s, catalog.Data{}, desired.Policy{Guard: workload.GuardOff})
	if len(got.MeshConfig.Proxies) != workload.MaxProxies-1 || len(got.Problems) != 1 || !strings.Contains(got.Problems[0].What, "service-8") {
		t.Errorf("%d further proxies, problems %q", len(got.MeshConfig.Proxies), got.Problems)
	}
}

// Intentions are asked only where somebody needs them, and then the virtual IPs
// of what they name.
func TestWhoIsAskedForSeveralSidecars(t *testing.T) {
	intentions := []registration.Intention{{Source: registration.Service{Name: "web"}, Destination: registration.Service{Name: "db"}}, {Source: registration.Service{Name: "other"}, Destination: registration.Service{Name: "cache"}}}
	one := map[string][]registration.Proxy{"a": {of("web", 1, transparentAt(0, 0)), of("api", 2)}, "b": {of("api", 3, transparentAt(0, 0))}}
	two := map[string][]registration.Proxy{"a": {of("web", 1, transparentAt(0, 0)), of("api", 2, transparentAt(0, 0))}}
	if catalog.Competing(one) || !catalog.Competing(two) {
		t.Errorf("compete: %t and %t, want false and true", catalog.Competing(one), catalog.Competing(two))
	}
	if services, _, _ := catalog.Questions(one, intentions); len(services) != 0 {
		t.Errorf("asked for %v, want nothing", services)
	}
	services, _, _ := catalog.Questions(two, intentions)
	if diff := cmp.Diff([]registration.Service{{Name: "db"}}, services); diff != "" {
		t.Errorf("asked for (-want +got):\n%s", diff)
	}
}

// An agent that has just started takes nothing from a proxy that Consul's answer
// will give back.
func TestOwnedVirtualIPsStayUntilConsulHasAnswered(t *testing.T) {
	s := desired.Allocation{Attachment: discover.Attachment{Key: found().Key}, Record: onRecord(workload.ModeTransparent), Proxies: []registration.Proxy{
		of("api", 20001, transparentAt(15001, 0)), of("web", 20002, transparentAt(15002, 0))}}
	s.Record.MeshConfig.Proxies = []workload.Sidecar{{Service: "web", VirtualIPs: addrs("240.0.0.1")}}
	named := []registration.Intention{{Source: registration.Service{Name: "web"}, Destination: registration.Service{Name: "db"}}}
	for name, c := range map[string]struct {
		known catalog.Data
		want  []netip.Addr
	}{
		"nothing is answered":           {catalog.Data{}, addrs("240.0.0.1")},
		"the virtual IP is not":         {catalog.Data{Intentions: named}, addrs("240.0.0.1")},
		"all is":                        {catalog.Data{Intentions: named, VirtualIPs: map[registration.Service][]netip.Addr{{Name: "db"}: addrs("240.0.0.2")}}, addrs("240.0.0.2")},
		"all is, and it owns no longer": {catalog.Data{Intentions: []registration.Intention{}}, nil},
	} {
		got := desired.For(s, c.known, desired.Policy{Guard: workload.GuardOff}).MeshConfig.Proxies
		if len(got) != 1 || !slices.Equal(got[0].VirtualIPs, c.want) {
			t.Errorf("%s: %+v, want %v", name, got, c.want)
		}
	}
}
