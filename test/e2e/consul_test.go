// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// meshRequest is what Nomad sends to the plugin of a transparent_proxy block with
// a port of its own for the sidecar and a static port without to: neither is
// named.
const meshRequest = `{"ProxyUserID":"101","ProxyInboundPort":0,"ProxyOutboundPort":15001,"ExcludeInboundPorts":["0"]}`

// Walk 3, a Consul change: from a registration to the kernel's rows, without the
// allocation noticing. Both proxies are Envoys that Consul configures, and one
// connection through both is held from the first change to the last.
func TestWalkOfAConsulChange(t *testing.T) {
	n := newMeshNode(t, false)
	n.config.Flows.Enabled = false // who records renews its lease in a map each second; writes are counted here
	n.runAgent()

	// An allocation that no plugin was called for: found and guarded.
	apiAlloc := n.allocate("", map[string]any{"hostPort": 25000, "containerPort": 8081, "protocol": "tcp"})
	apiProxy := apiAlloc.register("api", object{"Port": 20001})
	apiAlloc.startEnvoy(apiProxy)
	server := test.EchoProcess(t, apiAlloc.spec(1000), "tcp4", "127.0.0.1:8080")
	apiAlloc.eventually("api to be found", func(o workload.MeshConfig) bool {
		return o.InboundPort == 20001 && o.Guard == workload.GuardAudit && slices.Equal(o.ExcludeInboundPorts, []uint16{8081})
	})
	if w, err := apiAlloc.workload(); err != nil || w.Mode != workload.ModeDirect || len(w.Problems) > 0 {
		t.Errorf("api in the kernel = %+v, %v; want direct mode without problems", w, err)
	}

	// One that the plugin redirects, with what ADD could not know filled in.
	n.jobArgs = [][2]string{{"weir.guard", "audit"}, {"weir.exclude-inbound-ports", "health@7071"}}
	web := n.allocate(meshRequest, map[string]any{"hostPort": 8181, "containerPort": 8181, "protocol": "tcp"})
	sidecar := func(upstream int, proxy object) object {
		settings := object{"Mode": "transparent", "Upstreams": []object{{"DestinationName": "api", "LocalBindPort": upstream}}}
		for key, value := range proxy {
			settings[key] = value
		}
		return object{"Port": 20002, "Proxy": settings}
	}
	webProxy := web.register("web", sidecar(9191, nil))
	web.startEnvoy(webProxy)
	virtual := n.virtualIP("api")
	web.eventually("web's ports and upstream", func(o workload.MeshConfig) bool {
		return o.InboundPort == 20002 && slices.Equal(o.ExcludeInboundPorts, []uint16{8181}) && len(o.Upstreams) == 1 &&
			o.Upstreams[0].Listener.Port() == 9191 && slices.Contains(o.Upstreams[0].Addresses, virtual)
	})

	// A task that dials the upstream's virtual IP reaches its listener.
	task := web.newHeld()
	target := netip.AddrPortFrom(virtual, 80).String()
	web.wantPassed(t, task, target, server.Name, 9191)
	if greeting, err := task.say("before", target); err != nil || servedBy(greeting) != server.Name {
		t.Fatalf("dial of %s = %q, %v; want %q", target, greeting, err, server.Name)
	}

	stillOpen := func(t *testing.T) {
		t.Helper()
		if word, err := task.say("before", target); err != nil || word != "still here" {
			t.Errorf("the open connection says %q, %v", word, err)
		}
	}

	t.Run("no change, no write", func(t *testing.T) {
		before, record, writes := n.mustStatus(t), web.recordInfo(t), test.CountMapWrites(t)
		n.consul.Register(object{"Name": "bystander", "ID": "bystander", "Port": 1})
		test.Eventually(t, func() error {
			now := n.mustStatus(t)
			if now.Consul.Counts.Reads == before.Consul.Counts.Reads {
				return errors.New("no read since")
			}
			if turned := now.Alive.Sub(before.Alive); turned < 5*time.Second {
				return fmt.Errorf("the loop has turned for %s", turned)
			}
			return nil
		}, "Consul to be read again, and the loop to have looked twice")
		if seen := writes.Seen(); len(seen) > 0 {
			t.Errorf("maps were written to: %v", seen)
		}
		if now := n.mustStatus(t); now.Counts.Changes != before.Counts.Changes {
			t.Errorf("%d changes were written, want none", now.Counts.Changes-before.Counts.Changes)
		}
		if !os.SameFile(record, web.recordInfo(t)) {
			t.Error("the record was replaced")
		}
	})

	t.Run("an upstream is added", func(t *testing.T) {
		db := n.allocate("")
		db.startEnvoy(db.register("db", object{"Port": 20005}))
		behind := test.EchoProcess(t, db.spec(1000), "tcp4", "127.0.0.1:8080")
		writes := test.CountMapWrites(t)
		web.register("web", sidecar(9191, object{"Upstreams": []object{
			{"DestinationName": "api", "LocalBindPort": 9191}, {"DestinationName": "db", "LocalBindPort": 9494}}}))
		web.eventually("the second upstream", func(o workload.MeshConfig) bool { return len(o.Upstreams) == 2 })
		web.wantPassed(t, task, netip.AddrPortFrom(n.virtualIP("db"), 5432).String(), behind.Name, 9494)
		web.wantPassed(t, task, "127.0.0.1:9494", behind.Name, 9494)
		if len(writes.Seen()) == 0 {
			t.Error("no write of a change was seen")
		}
		stillOpen(t)
	})

	t.Run("the upstream's port moves", func(t *testing.T) {
		web.register("web", sidecar(9292, nil))
		web.eventually("the new port", func(o workload.MeshConfig) bool {
			return len(o.Upstreams) == 1 && o.Upstreams[0].Listener.Port() == 9292
		})
		web.wantPassed(t, task, target, server.Name, 9292)
		stillOpen(t)
	})

	t.Run("an expose path is added", func(t *testing.T) {
		asked := web.serveHealth(t, "127.0.0.1:8080")
		web.register("web", sidecar(9292, object{"Expose": object{"Paths": []object{{"Path": "/health", "ListenerPort": 21500, "LocalPathPort": 8080}}}}))
		web.eventually("the path's port to be open", func(o workload.MeshConfig) bool {
			return slices.Equal(o.ExcludeInboundPorts, []uint16{8181}) && slices.Equal(o.ExposedPorts, []uint16{21500})
		})
		test.Eventually(t, func() error {
			_, err := get(client(n.outside), fmt.Sprintf("http://%s/health", web.at(21500)))
			return err
		}, "the path to be answered through Envoy")
		if asked.Load() == 0 {
			t.Error("the path was answered, but not by the application")
		}
		stillOpen(t)
	})

	elsewhere := test.EchoProcess(t, test.Spec{NetNS: n.outside, UID: 1000, GID: 1000}, "tcp4", netip.AddrPortFrom(web.gate, 7000).String())
	for _, moves := range []struct {
		what, kind, name string
		port             uint16
	}{{"proxy-defaults", "proxy-defaults", "global", 15009}, {"service-defaults", "service-defaults", "web", 15010}} {
		t.Run(moves.what+" move the outbound listener", func(t *testing.T) {
			n.consul.Put("/v1/config", object{"Kind": moves.kind, "Name": moves.name, "TransparentProxy": object{"OutboundListenerPort": moves.port}})
			web.eventually("the port", func(o workload.MeshConfig) bool { return o.OutboundPort == moves.port })
			if w, err := web.workload(); err != nil || w.Proxy.Outbound != moves.port {
				t.Errorf("the kernel has outbound port %d, %v; want %d", w.Proxy.Outbound, err, moves.port)
			}
			web.wantPassed(t, task, elsewhere.Addr.String(), elsewhere.Name, moves.port)
			stillOpen(t)
		})
	}

	t.Run("a job strengthens the guard", func(t *testing.T) {
		apiAlloc.register("api", object{"Port": 20001, "Meta": object{"weir-guard": "enforce"}})
		apiAlloc.eventually("the guard", func(o workload.MeshConfig) bool { return o.Guard == workload.GuardEnforce })
	})

	t.Run("the proxy is deregistered while tasks run", func(t *testing.T) {
		before, err := web.known()
		if err != nil {
			t.Fatal(err)
		}
		n.consul.Deregister(webProxy)
		test.Eventually(t, func() error {
			view, err := web.view()
			if err == nil && (view.InSync || len(view.Proxies) > 0) {
				err = fmt.Errorf("the agent shows %+v", view)
			}
			return err
		}, "the agent to see it go")
		after, err := web.known()
		if err != nil || !workload.Merge(after.Request, after.MeshConfig).Equal(workload.Merge(before.Request, before.MeshConfig)) {
			t.Errorf("the workload changed to %+v, %v", after.MeshConfig, err)
		}
		stillOpen(t)
		web.wantPassed(t, task, target, server.Name, 9292)
	})

	t.Run("Consul is stopped and comes back", func(t *testing.T) {
		n.consul.Stop()
		n.wantInSync(t, false)
		late := n.allocate(meshRequest) // ADD asks nobody
		if w, err := late.workload(); err != nil || w.Mode != workload.ModeTransparent {
			t.Errorf("an allocation added meanwhile = %+v, %v", w, err)
		}
		stillOpen(t)
		web.wantPassed(t, task, target, server.Name, 9292)
		n.consul.Restart()
		n.wantInSync(t, true)
		stillOpen(t)
		web.wantPassed(t, task, target, server.Name, 9292)
		late.register("late", object{"Port": 20003, "Proxy": object{"Mode": "transparent"}})
		late.eventually("the registration after the restart", func(o workload.MeshConfig) bool { return o.InboundPort == 20003 })
	})

	t.Run("somebody takes away what holds it", func(t *testing.T) {
		before := n.mustStatus(t).Counts.Repaired
		removeFilesIn(t, filepath.Join(n.config.PinDir, "links"))
		removeFilesIn(t, filepath.Join(n.config.PinDir, "lookups"))
		test.Eventually(t, func() error {
			status, err := n.Status()
			if err == nil && !status.Healthy() {
				err = fmt.Errorf("problems: %+v", status.Problems)
			}
			if now := n.mustStatus(t).Counts.Repaired; err == nil && now <= before {
				err = fmt.Errorf("%d repaired before and %d after: it is not counted", before, now)
			}
			return err
		}, "the data path to be whole again")
		stillOpen(t)
		web.wantPassed(t, task, target, server.Name, 9292)
	})

	t.Run("the record is lost", func(t *testing.T) {
		before, err := web.known()
		if err != nil || before.Request.Guard != workload.GuardAudit || !slices.Equal(before.Request.ExcludeInboundPorts, []uint16{7071}) {
			t.Fatalf("web's record %+v, %v: want one with the job's arguments", before.Request, err)
		}
		removeFilesIn(t, filepath.Join(n.config.StateDir, "workloads"))
		apiAlloc.eventually("api's record", func(o workload.MeshConfig) bool { return o.Guard == workload.GuardEnforce })
		test.Eventually(t, func() error {
			now, err := web.known()
			if err == nil && !reflect.DeepEqual(now.Request, before.Request) {
				err = fmt.Errorf("the request is %+v, want %+v", now.Request, before.Request)
			}
			return err
		}, "web's record with its job's arguments, from what libcni remembers")
		stillOpen(t)
	})

	t.Run("an allocation ends that no plugin is called for", func(t *testing.T) {
		n.consul.Deregister(apiProxy)
		apiAlloc.end()
		test.Eventually(t, func() error {
			if _, err := apiAlloc.known(); !errors.Is(err, store.ErrUnknown) {
				return fmt.Errorf("api is still on record: %w", err)
			}
			return nil
		}, "api to be forgotten")
	})

	t.Run("the agent ends and another takes over", func(t *testing.T) {
		n.stop()
		if w, err := web.workload(); err != nil || w.Proxy.Identity == inspect.IdentityNone {
			t.Errorf("without an agent web is %+v, %v", w, err)
		}
		if _, err := n.status(); !errors.Is(err, api.ErrNotRunning) {
			t.Errorf("status without an agent: %v, want %v", err, api.ErrNotRunning)
		}
		n.runAgent()
		web.register("web", sidecar(9393, nil))
		web.eventually("a change seen by the new agent", func(o workload.MeshConfig) bool {
			return len(o.Upstreams) == 1 && o.Upstreams[0].Listener.Port() == 9393
		})
		stillOpen(t)
	})
}

func (n *meshNode) mustStatus(t *testing.T) api.Status {
	t.Helper()
	status, err := n.status()
	if err != nil {
		t.Fatal(err)
	}
	return status
}

func (n *meshNode) wantInSync(t *testing.T, want bool) {
	t.Helper()
	test.Eventually(t, func() error {
		status, err := n.status()
		if err == nil && status.Consul.InSync != want {
			err = fmt.Errorf("in sync: %v, %s", status.Consul.InSync, status.Consul.Error)
		}
		return err
	}, fmt.Sprintf("the agent to be in sync with Consul: %v", want))
}

func (a *meshAlloc) recordInfo(t *testing.T) os.FileInfo {
	t.Helper()
	info, err := os.Stat(filepath.Join(a.node.config.StateDir, "workloads", a.id+"-eth0.json"))
	if err != nil {
		t.Fatal(err)
	}
	return info
}
