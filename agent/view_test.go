// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/workload"
)

// Which of the node's proxies are an allocation's: a guard on the wrong one
// would close its ports.
func TestProxiesOfAnAllocation(t *testing.T) {
	own := netip.MustParseAddr("10.88.0.2")
	front := attachment{
		Job: workload.Job{AllocID: numbered(1), ID: "front"}, Addresses: []netip.Addr{own},
		Ports: []portMapping{{HostPort: 80, ContainerPort: 9191}},
	}
	elsewhere := func(change func(*attachment)) attachment { a := front; change(&a); return a }
	byItself := proxy{ID: "front", Kind: kindAPI, Self: service{Name: "front"}}
	with := func(change func(*proxy)) proxy { p := byItself; change(&p); return p }
	listeners := map[gateway][]uint16{{service{Name: "front"}, kindAPI}: {9191}}
	for _, test := range []struct {
		name  string
		a     attachment
		p     proxy
		ports map[gateway][]uint16
		want  bool
	}{
		{"its ID names the allocation", front, proxy{AllocID: numbered(1), Kind: kindSidecar}, nil, true},
		{"its ID names another", front, with(func(p *proxy) { p.AllocID = numbered(2) }), listeners, false},
		{"registered under its address", front, proxy{Kind: kindSidecar, Address: own}, nil, true},
		{"registered under its address, mapped", front, proxy{Kind: kindSidecar, Address: netip.MustParseAddr("::ffff:10.88.0.2")}, nil, true},
		{"registered under another address", front, with(func(p *proxy) { p.Address = netip.MustParseAddr("10.88.0.3") }), listeners, false},
		{"named as the job, which maps a listener", front, byItself, listeners, true},
		{"named as the job, which maps the port it is registered with",
			elsewhere(func(a *attachment) { a.Ports = []portMapping{{HostPort: 8443}} }), with(func(p *proxy) { p.Open = []uint16{8443} }), nil, true},
		{"its listeners are not known yet", front, byItself, nil, false},
		{"another group of the job", elsewhere(func(a *attachment) { a.Ports = []portMapping{{HostPort: 9191, ContainerPort: 80}} }), byItself, listeners, false},
		{"a job that maps nothing", elsewhere(func(a *attachment) { a.Ports = nil }), byItself, listeners, false},
		{"another job with the same ports", elsewhere(func(a *attachment) { a.Job.ID = "back" }), byItself, listeners, false},
		{"a job without a name", elsewhere(func(a *attachment) { a.Job.ID = "" }), with(func(p *proxy) { p.Self.Name = "" }), listeners, false},
		{"a sidecar of the job's name", front, with(func(p *proxy) { p.Kind = kindSidecar }), listeners, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			v := snapshot{Proxies: byAllocation([]proxy{test.p}), Facts: catalogData{GatewayPorts: test.ports}}
			var want []proxy
			if test.want {
				want = []proxy{test.p}
			}
			equal := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
			if diff := cmp.Diff(want, proxiesOf(v, test.a), equal, cmp.AllowUnexported(proxy{})); diff != "" {
				t.Errorf("proxies (-want +got):\n%s", diff)
			}
		})
	}
}
