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
	"github.com/weirmesh/weir/redirect/workload"
)

// Which of the node's proxies are an allocation's: a guard on the wrong one
// would close its ports.
func TestProxiesOfAnAllocation(t *testing.T) {
	own := netip.MustParseAddr("10.88.0.2")
	front := discover.Attachment{
		Job: workload.Job{AllocID: numbered(1), ID: "front"}, Addresses: []netip.Addr{own},
		Ports: []discover.PortMapping{{HostPort: 80, ContainerPort: 9191}},
	}
	elsewhere := func(change func(*discover.Attachment)) discover.Attachment { a := front; change(&a); return a }
	byItself := registration.Proxy{ID: "front", Kind: registration.KindAPI, Self: registration.Service{Name: "front"}}
	with := func(change func(*registration.Proxy)) registration.Proxy { p := byItself; change(&p); return p }
	listeners := map[registration.Gateway][]uint16{{Service: registration.Service{Name: "front"}, Kind: registration.KindAPI}: {9191}}
	for _, test := range []struct {
		name  string
		a     discover.Attachment
		p     registration.Proxy
		ports map[registration.Gateway][]uint16
		want  bool
	}{
		{"its ID names the allocation", front, registration.Proxy{AllocID: numbered(1), Kind: registration.KindSidecar}, nil, true},
		{"its ID names another", front, with(func(p *registration.Proxy) { p.AllocID = numbered(2) }), listeners, false},
		{"registered under its address", front, registration.Proxy{Kind: registration.KindSidecar, Address: own}, nil, true},
		{"registered under its address, mapped", front, registration.Proxy{Kind: registration.KindSidecar, Address: netip.MustParseAddr("::ffff:10.88.0.2")}, nil, true},
		{"registered under another address", front, with(func(p *registration.Proxy) { p.Address = netip.MustParseAddr("10.88.0.3") }), listeners, false},
		{"named as the job, which maps a listener", front, byItself, listeners, true},
		{"named as the job, which maps the port it is registered with",
			elsewhere(func(a *discover.Attachment) { a.Ports = []discover.PortMapping{{HostPort: 8443}} }), with(func(p *registration.Proxy) { p.Open = []uint16{8443} }), nil, true},
		{"its listeners are not known yet", front, byItself, nil, false},
		{"another group of the job", elsewhere(func(a *discover.Attachment) { a.Ports = []discover.PortMapping{{HostPort: 9191, ContainerPort: 80}} }), byItself, listeners, false},
		{"a job that maps nothing", elsewhere(func(a *discover.Attachment) { a.Ports = nil }), byItself, listeners, false},
		{"another job with the same ports", elsewhere(func(a *discover.Attachment) { a.Job.ID = "back" }), byItself, listeners, false},
		{"a job without a name", elsewhere(func(a *discover.Attachment) { a.Job.ID = "" }), with(func(p *registration.Proxy) { p.Self.Name = "" }), listeners, false},
		{"a sidecar of the job's name", front, with(func(p *registration.Proxy) { p.Kind = registration.KindSidecar }), listeners, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			v := catalog.Snapshot{Proxies: catalog.ByAllocation([]registration.Proxy{test.p}), Facts: catalog.Data{GatewayPorts: test.ports}}
			var want []registration.Proxy
			if test.want {
				want = []registration.Proxy{test.p}
			}
			equal := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
			if diff := cmp.Diff(want, desired.ProxiesOf(v, test.a), equal, cmp.AllowUnexported(registration.Proxy{})); diff != "" {
				t.Errorf("proxies (-want +got):\n%s", diff)
			}
		})
	}
}
