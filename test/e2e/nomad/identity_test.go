// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"syscall"
	"testing"

	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// outbound counts what came to Envoy's outbound listener: connections that it took,
// and those that it hung up on because nothing in the mesh has their destination.
const outbound = `listener\.127\.0\.0\.1_15001\.(downstream_cx_total|no_filter_chain_match)$`

// envoyUID runs tasks under Envoy's UID, which leave the mesh with consul-cni.
func envoyUID(t *testing.T, n *nomad.Node) {
	speaksHTTP(n, "id-server")
	n.ConfigEntry(map[string]any{"Kind": "mesh", "TransparentProxy": map[string]any{"MeshDestinationsOnly": true}})
	seen := listenOnNeighbour(t, n, nomad.NeighbourAddress+":80")
	job := n.Run("testdata/jobs/identity-uid.nomad.hcl")
	server := job.Alloc("server")
	for _, driver := range []string{"exec", "docker"} {
		t.Run(driver, func(t *testing.T) {
			a, service := job.Alloc(driver), "id-"+driver
			const url = "http://id-server.virtual.consul/"
			a.EventuallyGet("app", url, nil)
			var got wire.Outcome
			before := a.EnvoyStat("connect-proxy-"+service, service, outbound)
			grown := counted(a, func() { got = a.Get("app", url) })
			wantMesh(t, got, server, service)
			if after := a.EnvoyStat("connect-proxy-"+service, service, outbound); after != before+1 || grown["redirected"] != 1 {
				t.Errorf("connections to the proxy: %d, then %d; verdicts grew by %v; want one more, redirected 1", before, after, grown)
			}
			before = a.EnvoyStat("connect-proxy-"+service, service, outbound)
			grown = counted(a, func() { got = a.Get("app", "http://"+nomad.NeighbourAddress+"/") })
			if after := a.EnvoyStat("connect-proxy-"+service, service, outbound); after != before+1 {
				t.Errorf("connections to the proxy: %d, then %d, want one more", before, after)
			}
			if got.Reply != nil || got.Error == "" || grown["redirected"] != 1 || len(seen()) > 0 {
				t.Errorf("the neighbour, which is in no mesh: %s, verdicts grew by %v, it saw %v; want nothing but Envoy's hang-up", got, grown, seen())
			}
			if w := a.Workload(); w.Proxy.UID != 101 || w.Proxy.Identity != "cgroup" {
				t.Errorf("workload is %+v, want its proxy told by cgroup", w)
			}
		})
	}
}

// silentProxy: before its proxy listens a task reaches nobody, and nobody it; also
// who runs under the proxy's UID, since the agent knows the proxy by its task.
func silentProxy(t *testing.T, n *nomad.Node) {
	seen := listenOnNeighbour(t, n, nomad.NeighbourAddress+":80")
	job := n.Run("testdata/jobs/identity-silent.nomad.hcl")
	for _, driver := range []string{"exec", "docker"} {
		t.Run(driver, func(t *testing.T) {
			a, url := job.Alloc(driver), "http://"+nomad.NeighbourAddress+"/"
			proxy := "connect-proxy-id-silent-" + driver
			w := a.EventuallyWorkload("the proxy to be told by its cgroup", func(w nomad.Workload) bool { return w.Proxy.Identity == "cgroup" })
			if w.Proxy.Listeners != 0 {
				t.Errorf("workload is %+v, want a proxy that does not listen", w)
			}
			before := len(seen())
			var got wire.Outcome
			for _, task := range []string{"app", "envoy"} {
				grown := counted(a, func() { got = a.Get(task, url) })
				if got.Errno != syscall.ECONNREFUSED || grown["refused_no_proxy"] != 1 || len(seen()) > before {
					t.Errorf("task %s before the proxy listens: %s, verdicts grew by %v, the neighbour saw %v; want ECONNREFUSED", task, got, grown, seen())
				}
			}
			addr := w.Addresses[0]
			grown := counted(a, func() { got = n.Get(n.NetNS(), "http://"+addr+":8080/") })
			if got.Errno != syscall.ECONNREFUSED || grown["refused_inbound_no_proxy"] != 1 {
				t.Errorf("the node before the proxy listens: %s, verdicts grew by %v; want ECONNREFUSED", got, grown)
			}
			grown = counted(a, func() { got = a.Get(proxy, url) })
			if grown["proxy"] != 1 || len(seen()) != before+1 {
				t.Errorf("the proxy before it listens: %s, verdicts grew by %v, the neighbour saw %v; want it let out", got, grown, seen())
			}
		})
	}
}
