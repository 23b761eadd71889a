// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/cni/request"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// The pieces of the table: one allocation, and what may be known of it.
const exampleAlloc = "b412a0b1-e285-703a-01ba-3d1b2e2228f7"

func found() discover.Attachment {
	return discover.Attachment{
		Key: workload.AttachmentID{ContainerID: exampleAlloc, IfName: "eth0"}, Network: "nomad", NetNS: "/var/run/netns/" + exampleAlloc,
		Job: workload.Job{ID: "j1", AllocID: exampleAlloc}, Addresses: []netip.Addr{netip.MustParseAddr("172.26.64.13")},
		Ports: []discover.PortMapping{{HostPort: 20001, ContainerPort: 20001}, {HostPort: 8181, ContainerPort: 8181}, {HostPort: 25000, ContainerPort: 8080}},
	}
}

// meshArgs are the arguments of a transparent_proxy block, and of a job beside it.
func meshArgs(config string, own ...request.Arg) request.Args {
	return request.Args{Mesh: []request.Arg{{Key: "CONSUL_IPTABLES_CONFIG", Value: config}}, Own: own}
}

func onRecord(mode workload.Mode) *inspect.Record {
	return &inspect.Record{Key: found().Key, Request: workload.Request{Mode: mode}, Complete: true}
}

func recorded(meshConfig workload.MeshConfig) *inspect.Record {
	known := onRecord(workload.ModeDirect)
	known.MeshConfig = meshConfig
	return known
}

func withPorts(mode workload.Mode) *inspect.Record {
	known := onRecord(mode)
	known.MeshConfig.ExcludeInboundPorts = []uint16{8181, 20001}
	return known
}

func sidecar(change ...func(*registration.Proxy)) registration.Proxy {
	p := registration.Proxy{ID: "web-sidecar-proxy", Kind: registration.KindSidecar, AllocID: exampleAlloc, ServiceID: "web", Inbound: 20001}
	for _, edit := range change {
		edit(&p)
	}
	return p
}

func to(name, listener string) registration.Upstream {
	return registration.Upstream{Of: registration.Service{Name: name}, Listener: netip.MustParseAddrPort(listener)}
}

func addrs(texts ...string) (list []netip.Addr) {
	for _, text := range texts {
		list = append(list, netip.MustParseAddr(text))
	}
	return list
}

func TestDesire(t *testing.T) {
	audit := desired.Policy{Guard: workload.GuardAudit, ProxyUID: 101}
	forbidden := health.NewProblem(health.ProblemConsulForbidden, "a token", "forbidden")
	transparent := func(p *registration.Proxy) { p.Transparent, p.Outbound = true, 15009 }
	add := func(mode workload.Mode) *workload.Request {
		a := found()
		return &workload.Request{Network: a.Network, Job: a.Job, Mode: mode, ProxyUID: 101, Addresses: a.Addresses}
	}
	for _, c := range []struct {
		name    string
		subject desired.Allocation
		facts   catalog.Data
		policy  desired.Policy
		want    desired.Plan

		noResult bool // libcni has none of it
	}{
		{
			name:    "Consul knows nothing of it: what is stays",
			subject: desired.Allocation{Attachment: found(), Record: onRecord(workload.ModeTransparent)},
			policy:  audit,
		},
		{
			name:    "transparent: ports of Consul win, mapped ports stay the proxy's",
			subject: desired.Allocation{Attachment: found(), Record: onRecord(workload.ModeTransparent), Proxies: []registration.Proxy{sidecar(transparent)}},
			policy:  audit,
			want:    desired.Plan{MeshConfig: &workload.MeshConfig{InboundPort: 20001, OutboundPort: 15009, Guard: workload.GuardAudit}},
		},
		{
			name: "transparent: a static port without to is opened",
			subject: desired.Allocation{Attachment: func() discover.Attachment {
				a := found()
				a.Args = meshArgs(`{"ExcludeInboundPorts":["0","7071"]}`)
				return a
			}(), Record: onRecord(workload.ModeTransparent), Proxies: []registration.Proxy{sidecar(transparent)}},
			policy: audit,
			want: desired.Plan{MeshConfig: &workload.MeshConfig{
				InboundPort: 20001, OutboundPort: 15009, Guard: workload.GuardAudit, ExcludeInboundPorts: []uint16{8181}}},
		},
		{
			name: "expose paths, metrics and exposed checks are open to the proxy's listeners",
			subject: desired.Allocation{Attachment: found(), Record: onRecord(workload.ModeTransparent), Proxies: []registration.Proxy{sidecar(transparent, func(p *registration.Proxy) {
				p.Open, p.ExposeCheck = []uint16{9102, 21500}, true
			})}},
			facts:  catalog.Data{CheckPorts: map[string][]uint16{"web": {21501}, "other": {1}}},
			policy: audit,
			want: desired.Plan{MeshConfig: &workload.MeshConfig{
				InboundPort: 20001, OutboundPort: 15009, Guard: workload.GuardAudit, ExposedPorts: []uint16{9102, 21500, 21501}}},
		},
		{
			name:    "exposed checks that Consul does not tell are told to whom they concern",
			subject: desired.Allocation{Attachment: discover.Attachment{Key: found().Key}, Record: onRecord(workload.ModeDirect), Proxies: []registration.Proxy{sidecar(func(p *registration.Proxy) { p.ExposeCheck = true })}},
			facts:   catalog.Data{NoChecks: forbidden, NoIntentions: health.Problem{What: "of others"}},
			policy:  desired.Policy{Guard: workload.GuardEnforce},
			want: desired.Plan{
				MeshConfig: &workload.MeshConfig{InboundPort: 20001, Guard: workload.GuardEnforce},
				Problems:   []health.Problem{forbidden},
			},
		},
		{
			name:    "the operator lets packets be forwarded",
			subject: desired.Allocation{Attachment: discover.Attachment{Key: found().Key}, Record: onRecord(workload.ModeDirect), Proxies: []registration.Proxy{sidecar()}},
			policy:  desired.Policy{Guard: workload.GuardEnforce, Forward: true},
			want:    desired.Plan{MeshConfig: &workload.MeshConfig{InboundPort: 20001, Guard: workload.GuardEnforce, Forward: true}},
		},
		{
			name:    "checks that nobody exposes are no problem",
			subject: desired.Allocation{Attachment: discover.Attachment{Key: found().Key}, Record: onRecord(workload.ModeDirect), Proxies: []registration.Proxy{sidecar()}},
			facts:   catalog.Data{NoChecks: forbidden},
			policy:  audit,
			want:    desired.Plan{MeshConfig: &workload.MeshConfig{InboundPort: 20001, Guard: workload.GuardAudit}},
		},
		{
			name:    "transparent on record, direct in Consul",
			subject: desired.Allocation{Attachment: found(), Record: onRecord(workload.ModeTransparent), Proxies: []registration.Proxy{sidecar()}},
			policy:  audit,
			want: desired.Plan{
				MeshConfig: &workload.MeshConfig{InboundPort: 20001, Guard: workload.GuardAudit},
				Problems: []health.Problem{health.NewProblem(health.ProblemModeMismatch,
					`set mode = "transparent" in the service's service-defaults or in proxy-defaults`,
					"it is redirected, but Consul has its proxy in direct mode, without an outbound listener")},
			},
		},
		{
			name:    "no plugin was called: put under Weir, mapped ports open",
			subject: desired.Allocation{Attachment: found(), Proxies: []registration.Proxy{sidecar()}},
			policy:  audit,
			want: desired.Plan{
				Add: add(workload.ModeDirect),
				MeshConfig: &workload.MeshConfig{
					InboundPort: 20001, Guard: workload.GuardAudit, ExcludeInboundPorts: []uint16{8080, 8181}},
			},
		},
		{
			name:    "no plugin was called, and Consul has it transparent",
			subject: desired.Allocation{Attachment: found(), Proxies: []registration.Proxy{sidecar(transparent)}},
			policy:  audit,
			want: desired.Plan{
				Add: add(workload.ModeDirect),
				MeshConfig: &workload.MeshConfig{
					InboundPort: 20001, Guard: workload.GuardAudit, ExcludeInboundPorts: []uint16{8080, 8181}},
				Problems: []health.Problem{health.NewProblem(health.ProblemModeMismatch,
					"give the job a transparent_proxy block, or take the mode from service-defaults or proxy-defaults",
					"Consul has its proxy in transparent mode, but the job has no transparent_proxy block: its connections pass the mesh")},
			},
		},
		{
			name: "a plugin was asked, but its record is not there: not the agent's to make up",
			subject: desired.Allocation{Attachment: func() discover.Attachment {
				a := found()
				a.Args = meshArgs(`{}`)
				return a
			}(), Proxies: []registration.Proxy{sidecar(transparent)}},
			policy: audit,
		},
		{
			name: "a gateway: its listeners are open and it has none for the mesh",
			subject: desired.Allocation{Attachment: found(), Proxies: []registration.Proxy{{
				ID: "in", Kind: registration.KindIngress, AllocID: exampleAlloc, Self: registration.Service{Name: "in"}, Open: []uint16{8443}}}},
			facts:  catalog.Data{GatewayPorts: map[registration.Gateway][]uint16{{Service: registration.Service{Name: "in"}, Kind: registration.KindIngress}: {8080, 9090}}},
			policy: audit,
			want: desired.Plan{
				Add: add(workload.ModeGateway),
				MeshConfig: &workload.MeshConfig{
					Guard: workload.GuardAudit, ExcludeInboundPorts: []uint16{8080, 8181, 20001}, ExposedPorts: []uint16{8080, 8443, 9090}},
			},
		},
		{
			name: "two services in one allocation",
			subject: desired.Allocation{Attachment: discover.Attachment{Key: found().Key}, Record: onRecord(workload.ModeDirect), Proxies: []registration.Proxy{
				sidecar(func(p *registration.Proxy) { p.Upstreams = []registration.Upstream{to("cache", "127.0.0.1:6379")} }),
				sidecar(func(p *registration.Proxy) {
					p.ID, p.Service, p.Inbound, p.Upstreams = "z", "z", 20002, []registration.Upstream{to("api", "127.0.0.1:9191")}
				}),
			}},
			facts: catalog.Data{VirtualIPs: map[registration.Service][]netip.Addr{
				{Name: "api"}: addrs("240.0.0.1"), {Name: "cache"}: addrs("240.0.0.2", "10.1.1.1")}},
			policy: audit,
			want: desired.Plan{MeshConfig: &workload.MeshConfig{
				InboundPort: 20001, Service: "web", Proxies: []workload.Sidecar{{Service: "z", InboundPort: 20002}}, Guard: workload.GuardAudit,
				Upstreams: []workload.Upstream{
					{Name: "api", Addresses: addrs("240.0.0.1"), Listener: netip.MustParseAddrPort("127.0.0.1:9191")},
					{Name: "cache", Addresses: addrs("240.0.0.2", "10.1.1.1"), Listener: netip.MustParseAddrPort("127.0.0.1:6379")},
				},
			}},
		},
		{
			name: "upstreams without a virtual IP here are left to their listener",
			subject: desired.Allocation{Attachment: discover.Attachment{Key: found().Key}, Record: onRecord(workload.ModeDirect), Proxies: []registration.Proxy{
				sidecar(func(p *registration.Proxy) {
					far := to("api", "127.0.0.1:7000")
					far.Remote = true
					p.Upstreams = []registration.Upstream{far, to("new", "127.0.0.1:7001"), to("api", "127.0.0.1:9191"), to("api", "127.0.0.1:9292")}
				})}},
			facts: catalog.Data{
				VirtualIPs: map[registration.Service][]netip.Addr{{Name: "api"}: addrs("240.0.0.1")},
				Unanswered: map[registration.Service]health.Problem{{Name: "new"}: forbidden},
			},
			policy: audit,
			want: desired.Plan{
				MeshConfig: &workload.MeshConfig{InboundPort: 20001, Guard: workload.GuardAudit, Upstreams: []workload.Upstream{
					{Name: "api", Addresses: addrs("240.0.0.1"), Listener: netip.MustParseAddrPort("127.0.0.1:9191")}}},
				Problems: []health.Problem{forbidden},
			},
		},
		{
			name: "what Consul has not answered yet stays as it is on record",
			subject: desired.Allocation{
				Attachment: discover.Attachment{Key: found().Key},
				Record: recorded(workload.MeshConfig{ExposedPorts: []uint16{8181}, Upstreams: []workload.Upstream{
					{Name: "api", Addresses: addrs("240.0.0.1"), Listener: netip.MustParseAddrPort("127.0.0.1:9191")},
					{Name: "cache", Addresses: addrs("240.0.0.2"), Listener: netip.MustParseAddrPort("127.0.0.1:6379")},
					{Name: "gone", Addresses: addrs("240.0.0.3"), Listener: netip.MustParseAddrPort("127.0.0.1:7000")},
				}}),
				Proxies: []registration.Proxy{sidecar(func(p *registration.Proxy) {
					p.ExposeCheck = true
					p.Upstreams = []registration.Upstream{to("api", "127.0.0.1:9292"), to("cache", "127.0.0.1:6379")}
				})}},
			facts:  catalog.Data{VirtualIPs: map[registration.Service][]netip.Addr{{Name: "cache"}: nil}},
			policy: audit,
			want: desired.Plan{MeshConfig: &workload.MeshConfig{
				InboundPort: 20001, ExposedPorts: []uint16{8181}, Guard: workload.GuardAudit,
				Upstreams: []workload.Upstream{{Name: "api", Addresses: addrs("240.0.0.1"), Listener: netip.MustParseAddrPort("127.0.0.1:9292")}},
			}},
		},
		{
			name: "listeners of a gateway that Consul has not answered yet stay open",
			subject: desired.Allocation{
				Attachment: discover.Attachment{Key: found().Key},
				Record:     recorded(workload.MeshConfig{ExcludeInboundPorts: []uint16{8181}}),
				Proxies: []registration.Proxy{sidecar(func(p *registration.Proxy) {
					p.Kind, p.Inbound, p.Self = registration.KindAPI, 0, registration.Service{Name: "gateway"}
				})}},
			policy: audit,
			want:   desired.Plan{MeshConfig: &workload.MeshConfig{ExposedPorts: []uint16{8181}, Guard: workload.GuardAudit}},
		},
		{
			name: "a job strengthens the guard",
			subject: desired.Allocation{Attachment: discover.Attachment{Key: found().Key}, Record: onRecord(workload.ModeDirect),
				Proxies: []registration.Proxy{sidecar(func(p *registration.Proxy) { p.Guard = workload.GuardEnforce })}},
			policy: audit,
			want:   desired.Plan{MeshConfig: &workload.MeshConfig{InboundPort: 20001, Guard: workload.GuardEnforce}},
		},
		{
			name: "a job strengthens the egress guard, by its meta and by the plugin, and does not weaken the node's",
			subject: desired.Allocation{Attachment: discover.Attachment{Key: found().Key}, Record: func() *inspect.Record {
				known := onRecord(workload.ModeDirect)
				known.Request.Egress = workload.GuardEnforce
				return known
			}(), Proxies: []registration.Proxy{sidecar(func(p *registration.Proxy) { p.Egress = workload.GuardAudit })}},
			policy: desired.Policy{Guard: workload.GuardAudit, Egress: workload.GuardAudit},
			want:   desired.Plan{MeshConfig: &workload.MeshConfig{InboundPort: 20001, Guard: workload.GuardAudit, Egress: workload.GuardEnforce}},
		},
		{
			name: "the node's egress guard",
			subject: desired.Allocation{Attachment: discover.Attachment{Key: found().Key}, Record: onRecord(workload.ModeDirect),
				Proxies: []registration.Proxy{sidecar(func(p *registration.Proxy) { p.Egress = workload.GuardOff })}},
			policy: desired.Policy{Guard: workload.GuardAudit, Egress: workload.GuardAudit},
			want:   desired.Plan{MeshConfig: &workload.MeshConfig{InboundPort: 20001, Guard: workload.GuardAudit, Egress: workload.GuardAudit}},
		},
		{
			name: "a job strengthens the guard by the plugin",
			subject: desired.Allocation{Attachment: discover.Attachment{Key: found().Key}, Record: func() *inspect.Record {
				known := onRecord(workload.ModeDirect)
				known.Request.Guard = workload.GuardEnforce
				return known
			}(), Proxies: []registration.Proxy{sidecar()}},
			policy: audit,
			want:   desired.Plan{MeshConfig: &workload.MeshConfig{InboundPort: 20001, Guard: workload.GuardEnforce}},
		},
		{
			name: "a plugin was asked by the job's own arguments, but its record is not there",
			subject: desired.Allocation{Attachment: func() discover.Attachment {
				a := found()
				a.Args.Own = []request.Arg{{Key: "weir.mode", Value: "transparent"}}
				return a
			}(), Proxies: []registration.Proxy{sidecar(transparent)}},
			policy: audit,
		},
		{
			name: "a job does not weaken the guard",
			subject: desired.Allocation{Attachment: discover.Attachment{Key: found().Key}, Record: onRecord(workload.ModeDirect),
				Proxies: []registration.Proxy{sidecar(func(p *registration.Proxy) { p.Guard = workload.GuardOff })}},
			policy: desired.Policy{Guard: workload.GuardEnforce},
			want:   desired.Plan{MeshConfig: &workload.MeshConfig{InboundPort: 20001, Guard: workload.GuardEnforce}},
		},
		{
			name: "transparent: a dynamic port that nobody can exclude ends in the mesh",
			subject: desired.Allocation{Attachment: func() discover.Attachment {
				a := found()
				a.Ports = append(a.Ports, discover.PortMapping{HostPort: 25001, ContainerPort: 25001, Protocol: "tcp"}, discover.PortMapping{HostPort: 25001, ContainerPort: 25001, Protocol: "udp"},
					discover.PortMapping{HostPort: 25002, ContainerPort: 25002})
				return a
			}(), Record: func() *inspect.Record {
				known := onRecord(workload.ModeTransparent)
				known.Request.ExcludeInboundPorts = []uint16{25002}
				return known
			}(), Proxies: []registration.Proxy{sidecar(transparent)}},
			policy: audit,
			want: desired.Plan{
				MeshConfig: &workload.MeshConfig{InboundPort: 20001, OutboundPort: 15009, Guard: workload.GuardAudit},
				Problems: []health.Problem{health.NewProblem(health.ProblemHostPortInMesh,
					`give the label the number that the task listens on, port "LABEL" { to = 8080 }, and exclude that one, transparent_proxy { exclude_inbound_ports = ["8080"] }; where only the mesh needs it, take the label away`,
					"port 25001 of the host leads to the proxy's mTLS listener: its label in the job's network block has no fixed number inside, which could be excluded")},
			},
		},
		{
			name:    "what counted is withdrawn: what the node itself knows stays",
			subject: desired.Allocation{Attachment: found(), Record: onRecord(workload.ModeDirect), Withdrawn: true},
			policy:  audit,
			want:    desired.Plan{MeshConfig: &workload.MeshConfig{ExcludeInboundPorts: []uint16{8080, 8181, 20001}, Guard: workload.GuardAudit}},
		},
		{
			name: "without libcni's result the ports last known stay open", noResult: true,
			subject: desired.Allocation{Attachment: discover.Attachment{Key: found().Key}, Record: withPorts(workload.ModeDirect),
				Proxies: []registration.Proxy{sidecar()}},
			policy: audit,
			want:   desired.Plan{MeshConfig: &workload.MeshConfig{InboundPort: 20001, ExcludeInboundPorts: []uint16{8181}, Guard: workload.GuardAudit}},
		},
		{
			name: "transparent: without libcni's result the static ports last known stay open", noResult: true,
			subject: desired.Allocation{Attachment: discover.Attachment{Key: found().Key}, Record: withPorts(workload.ModeTransparent),
				Proxies: []registration.Proxy{sidecar(transparent)}},
			policy: audit,
			want:   desired.Plan{MeshConfig: &workload.MeshConfig{InboundPort: 20001, OutboundPort: 15009, ExcludeInboundPorts: []uint16{8181}, Guard: workload.GuardAudit}},
		},
		{
			name: "withdrawn and without libcni's result", noResult: true,
			subject: desired.Allocation{Attachment: discover.Attachment{Key: found().Key}, Record: withPorts(workload.ModeDirect), Withdrawn: true},
			policy:  audit,
			want:    desired.Plan{MeshConfig: &workload.MeshConfig{ExcludeInboundPorts: []uint16{8181, 20001}, Guard: workload.GuardAudit}},
		},
		{
			name: "a gateway beside a sidecar has its listeners, and they are its own",
			subject: desired.Allocation{Attachment: discover.Attachment{Key: found().Key}, Record: onRecord(workload.ModeDirect), Proxies: []registration.Proxy{
				sidecar(func(p *registration.Proxy) { p.Open = []uint16{9102} }),
				{ID: "edge", Kind: registration.KindMesh, AllocID: exampleAlloc, Self: registration.Service{Name: "edge"}, Open: []uint16{8443}},
			}},
			policy: audit,
			want: desired.Plan{MeshConfig: &workload.MeshConfig{
				InboundPort: 20001, ExposedPorts: []uint16{9102}, Guard: workload.GuardAudit,
				Service: "web", Proxies: []workload.Sidecar{{Service: "edge", ExposedPorts: []uint16{8443}}}}},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.subject.Cached = !c.noResult
			got := desired.For(c.subject, c.facts, c.policy)
			if diff := cmp.Diff(c.want, got, sameAddrs()); diff != "" {
				t.Errorf("wish (-want +got):\n%s", diff)
			}
			if got.MeshConfig == nil {
				return
			}
			request := workload.Request{}
			if got.Add != nil {
				request = *got.Add
			} else if c.subject.Record != nil {
				request = c.subject.Record.Request
			}
			if err := workload.Merge(request, *got.MeshConfig).Validate(); err != nil {
				t.Errorf("the data path would refuse it: %v", err)
			}
			again := desired.For(c.subject, c.facts, c.policy)
			if !workload.Merge(request, *again.MeshConfig).Equal(workload.Merge(request, *got.MeshConfig)) {
				t.Error("the same again is not the same")
			}
		})
	}
}
