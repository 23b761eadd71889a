// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// fingerprint: Nomad reads the version of our plugin as that of consul-cni, and
// places a transparent_proxy job by it.
func fingerprint(t *testing.T, n *nomad.Node) {
	version := n.Attributes()["plugins.cni.version.consul-cni"]
	var major, minor, patch int
	if _, err := fmt.Sscanf(version, "v%d.%d.%d", &major, &minor, &patch); err != nil {
		t.Fatalf("version of consul-cni is %q: %v", version, err)
	}
	if got := []int{major, minor, patch}; slices.Compare(got, []int{1, 4, 2}) < 0 {
		t.Errorf("version of consul-cni is %s, want 1.4.2 or newer", version)
	}
	job := n.Submit("testdata/jobs/tproxy-docker.nomad.hcl")
	var told struct {
		TaskGroups []struct {
			Constraints []struct{ LTarget, Operand, RTarget string }
		}
	}
	n.NomadGet("/v1/job/"+job.ID, &told)
	for _, group := range told.TaskGroups {
		found := false
		for _, c := range group.Constraints {
			found = found || c.LTarget == "${attr.plugins.cni.version.consul-cni}" && c.Operand == "semver" && c.RTarget == ">= 1.4.2"
		}
		if !found {
			t.Errorf("constraints of the group are %+v, want one on consul-cni", group.Constraints)
		}
	}
	job.Await()
}

// speaksHTTP makes the mesh speak HTTP to a service, so that its proxy tells it
// the caller's certificate.
func speaksHTTP(n *nomad.Node, services ...string) {
	for _, service := range services {
		n.ConfigEntry(map[string]any{"Kind": "service-defaults", "Name": service, "Protocol": "http"})
	}
}

// wantMesh fails where an answer did not come through both proxies: the server
// must have been asked by its own, with the caller's certificate in hand.
func wantMesh(t *testing.T, got wire.Outcome, server *nomad.Alloc, caller string) {
	t.Helper()
	if got.Reply == nil || got.Reply.Alloc != server.ID {
		t.Fatalf("got %s, want an answer of %s", got, server.ID)
	}
	if !strings.HasPrefix(got.Reply.Remote, "127.0.0.1:") {
		t.Errorf("the server was asked by %s, want its own proxy at 127.0.0.1", got.Reply.Remote)
	}
	if !strings.Contains(got.Reply.ClientCert, "/svc/"+caller) {
		t.Errorf("the caller's certificate is %q, want that of %s", got.Reply.ClientCert, caller)
	}
}

// wantVirtual fails where the client did not dial a virtual IP from the
// allocation's own address, and see just that.
func wantVirtual(t *testing.T, got wire.Outcome) {
	t.Helper()
	wantVirtualPeer(t, got)
	if !strings.HasPrefix(got.From, "172.26.") {
		t.Errorf("the client sees itself at %s, want the allocation's address", got.From)
	}
}

// wantVirtualPeer is wantVirtual for an explicit upstream, too, whose listener is
// dialled by loopback.
func wantVirtualPeer(t *testing.T, got wire.Outcome) {
	t.Helper()
	if !strings.HasPrefix(got.To, "240.0.0.") || !strings.HasSuffix(got.To, ":80") {
		t.Errorf("the client sees its peer at %s, want the virtual IP that it dialled, port 80", got.To)
	}
}

// counted runs f and returns by how much the allocation's verdicts grew.
func counted(a *nomad.Alloc, f func()) map[string]uint64 {
	before := a.Verdicts()
	f()
	after := a.Verdicts()
	for verdict := range after {
		after[verdict] -= before[verdict]
	}
	return after
}

// transparentDocker runs the job of Nomad's documentation with Docker and Nomad's
// own sidecar.
func transparentDocker(t *testing.T, n *nomad.Node) {
	speaksHTTP(n, "api", "web")
	job := n.Run("testdata/jobs/tproxy-docker.nomad.hcl")
	api, web := job.Alloc("api"), job.Alloc("web")
	const url = "http://api.virtual.consul/hello"
	web.EventuallyGet("web", url, nil)

	var got wire.Outcome
	asked := counted(web, func() { got = web.Get("web", url) })
	wantMesh(t, got, api, "web")
	wantVirtual(t, got)
	if asked["redirected"] != 1 || asked["dns"] == 0 {
		t.Errorf("the client's verdicts grew by %v, want redirected 1, dns", asked)
	}
	// Envoy may have used a connection to the other once more.
	if client, server := web.Verdicts(), api.Verdicts(); client["proxy"] == 0 || server["inbound"] == 0 {
		t.Errorf("verdicts are %v and %v, want a connection of the client's proxy that came in at the server's", client, server)
	}
	for _, a := range []*nomad.Alloc{api, web} {
		if w := a.Workload(); w.Proxy.Identity != "cgroup" || w.Mode != "transparent" || len(w.Problems) > 0 {
			t.Errorf("workload of %s is %+v, want transparent, identity by cgroup, no problems", a.Group, w)
		}
	}

	t.Run("Intention", func(t *testing.T) {
		n := n.For(t)
		// A destination that is denied is none of the client's any more: at once
		// Envoy says 403, and then it knows no way there.
		n.ConfigEntry(map[string]any{"Kind": "mesh", "TransparentProxy": map[string]any{"MeshDestinationsOnly": true}})
		n.Intend("web", "api", "deny")
		web.EventuallyGet("web", url, func(got wire.Outcome) error {
			if got.Reply != nil || got.Status != 403 && got.Error == "" {
				return fmt.Errorf("got %s, want Envoy to refuse", got)
			}
			return nil
		})
	})
	wantMesh(t, web.EventuallyGet("web", url, nil), api, "web")

	// The application listens on all addresses, and yet nobody reaches it there.
	addr := api.Workload().Addresses[0]
	got = wire.Outcome{}
	refused := counted(api, func() { got = n.Get(n.NetNS(), "http://"+addr+":8080/") })
	if got.Reply != nil || got.Error == "" || refused["inbound"] == 0 {
		t.Errorf("the node asks the application itself: %s, verdicts %v; want no answer but Envoy's hang-up", got, refused)
	}
}

// transparentExec is the same with the exec driver, beside explicit upstreams.
func transparentExec(t *testing.T, n *nomad.Node) {
	speaksHTTP(n, "exec-api", "exec-web", "exec-old", "exec-raw")
	job := n.Run("testdata/jobs/tproxy-exec.nomad.hcl")
	api, web, old, raw := job.Alloc("api"), job.Alloc("web"), job.Alloc("old"), job.Alloc("raw")
	const url = "http://exec-api.virtual.consul/hello"
	got := web.EventuallyGet("web", url, func(got wire.Outcome) error {
		if got.Reply == nil || !strings.HasPrefix(got.From, "127.0.0.1:") {
			return fmt.Errorf("got %s, want an answer by the upstream's own listener", got)
		}
		return nil
	})
	wantMesh(t, got, api, "exec-web")
	wantVirtualPeer(t, got)

	t.Run("Upstreams", func(t *testing.T) {
		for task, a := range map[string]*nomad.Alloc{"web": web, "old": old} {
			address := a.Env(task)["NOMAD_UPSTREAM_ADDR_exec_api"]
			if address != "127.0.0.1:9191" {
				t.Errorf("NOMAD_UPSTREAM_ADDR_exec_api of %s is %q, want 127.0.0.1:9191", task, address)
			}
			wantMesh(t, a.EventuallyGet(task, "http://"+address+"/", nil), api, "exec-"+task)
		}
	})

	t.Run("Intention", func(t *testing.T) {
		n := n.For(t)
		address := "http://" + old.Env("old")["NOMAD_UPSTREAM_ADDR_exec_api"] + "/"
		n.Intend("exec-old", "exec-api", "deny")
		old.EventuallyGet("old", address, func(got wire.Outcome) error {
			if got.Status != 403 {
				return fmt.Errorf("got %s, want 403 by the server's proxy", got)
			}
			return nil
		})
		wantMesh(t, web.Get("web", url), api, "exec-web")
	})

	t.Run("RawExec", func(t *testing.T) {
		got := raw.EventuallyGet("raw", url, nil)
		wantMesh(t, got, api, "exec-raw")
		wantVirtual(t, got)
		// With v1 controllers beside cgroup v2 raw_exec puts all into one group of v2.
		identity := "cgroup"
		if raw.Cgroup("raw") == raw.Cgroup("connect-proxy-exec-raw") {
			identity = "uid"
		}
		if w := raw.Workload(); w.Proxy.Identity != identity || w.Mode != "transparent" || len(w.Problems) > 0 {
			t.Errorf("workload is %+v, want transparent, identity by %s, no problems", w, identity)
		}
	})

	t.Run("ExposedCheck", func(t *testing.T) {
		// Await has seen the check pass; the application listens on loopback only.
		grown := counted(api, func() {
			test.Eventually(t, func() error {
				var checks map[string]struct{ Name, Status, ServiceName string }
				n.ConsulGet("/v1/agent/checks", &checks)
				for _, check := range checks {
					if check.ServiceName == "exec-api" && check.Status != "passing" {
						return fmt.Errorf("check %q is %s", check.Name, check.Status)
					}
				}
				if api.Verdicts()["inbound_excluded"] < 3 {
					return fmt.Errorf("verdicts are %v", api.Verdicts())
				}
				return nil
			}, "checks to come in by the exposed port")
		})
		t.Logf("while waiting: %v", grown)
	})

	t.Run("EnvoyDies", func(t *testing.T) {
		web.Kill("connect-proxy-exec-web")
		addr := api.Workload().Addresses[0]
		for _, target := range []string{url, "http://" + addr + ":8080/", "http://" + nomad.NeighbourAddress + "/"} {
			got := web.Get("web", target)
			if got.Errno != syscall.ECONNREFUSED {
				t.Errorf("GET %s without the proxy: %s, want ECONNREFUSED", target, got)
			}
		}
		// The first one is for a listener of the proxy's that is gone.
		if got := web.Verdicts()["refused_no_proxy"]; got != 2 {
			t.Errorf("verdicts are %v, want refused_no_proxy 2", web.Verdicts())
		}
		wantMesh(t, web.EventuallyGet("web", url, nil), api, "exec-web")
	})
}
