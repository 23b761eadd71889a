// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// runsTask runs a task of the allocation in the namespace, which does
// not listen, and returns what ends it: until then the namespace lives.
func runsTask(t *testing.T, id, name, netns string) (end func()) {
	t.Helper()
	dir, err := os.Open(test.NewCgroup(t).Child(t, id+"."+name+".scope").Path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	task := exec.Command("nsenter", "--net="+netns, "sleep", "600")
	task.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: syscall.SIGKILL}
	if err := task.Start(); err != nil {
		t.Fatal(err)
	}
	end = sync.OnceFunc(func() {
		if err := task.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = task.Wait() // it was killed
	})
	t.Cleanup(end)
	return end
}

// Which registrations count for an allocation: its job maps 20001, 8181 and 8080.
func TestWhichRegistrationsCount(t *testing.T) {
	web := sidecar(func(p *registration.Proxy) { p.ID, p.Self.Name = "web", "web-sidecar-proxy" })
	api := sidecar(func(p *registration.Proxy) { p.ID, p.Self.Name, p.Inbound = "api", "api-sidecar-proxy", 8080 })
	evil := sidecar(func(p *registration.Proxy) { p.ID, p.Self.Name = "evil", "evil-sidecar-proxy" }) // at web's port
	at := func(p registration.Proxy, port uint16) registration.Proxy { p.Inbound = port; return p }
	free := func(p registration.Proxy) registration.Proxy { p.AllocID = ""; return p } // by its address
	edge := registration.Proxy{ID: "edge", Kind: registration.KindAPI, Self: registration.Service{Name: "edge"}, Open: []uint16{8181}}
	intruder := registration.Proxy{ID: "intruder", Kind: registration.KindAPI, Self: registration.Service{Name: "intruder"}, Open: []uint16{19000}}
	transparent := func() *inspect.Record {
		known := onRecord(workload.ModeTransparent)
		known.Request.InboundPort = 20005
		return known
	}
	counted := func(ids ...string) map[string]identity.Claim {
		claims := make(map[string]identity.Claim)
		for _, id := range ids {
			claims[id] = identity.Claim{Counted: true}
		}
		return claims
	}
	for _, c := range []struct {
		name    string
		proxies []registration.Proxy
		e       identity.Evidence
		listens []uint16
		known   *inspect.Record
		uncached,
		gateway bool // the job is edge's
		want string
	}{
		{name: "its port is mapped, and nothing runs yet", proxies: []registration.Proxy{web}, want: "web"},
		{name: "its port is that of the request", proxies: []registration.Proxy{at(web, 20005)}, known: transparent(), want: "web"},
		{name: "its port is not the allocation's", proxies: []registration.Proxy{at(web, 20009)}, known: transparent()},
		{name: "... but its task runs", proxies: []registration.Proxy{at(web, 20009)}, e: identity.Evidence{Tasks: []string{"connect-proxy-web"}}, want: "web"},
		{name: "its task runs under the other name that Nomad gives", proxies: []registration.Proxy{web}, e: identity.Evidence{Tasks: []string{"connect-proxy-web-1a2b3c"}}, want: "web"},
		{name: "another's at the same port", proxies: []registration.Proxy{evil, web}, e: identity.Evidence{Tasks: []string{"app", "connect-proxy-web"}}, want: "web"},
		{name: "another's at another mapped port", proxies: []registration.Proxy{at(evil, 8181), web}, e: identity.Evidence{Tasks: []string{"connect-proxy-web"}}, want: "web"},
		{name: "another's alone, while the allocation's own is deregistered", proxies: []registration.Proxy{evil}, e: identity.Evidence{Tasks: []string{"connect-proxy-web"}}},
		{name: "another's, whose author gives a task below a helper's name", proxies: []registration.Proxy{evil, web},
			e: identity.Evidence{Tasks: []string{"connect-proxy-evil-helper", "connect-proxy-web"}}, want: "web"},
		{name: "the task was seen once, and is restarting", proxies: []registration.Proxy{api, web},
			e: identity.Evidence{Tasks: []string{"connect-proxy-web"}, Claims: map[string]identity.Claim{"api": {Shown: true}}, Settled: true}, want: "api web"},
		{name: "both tasks of a group with two", proxies: []registration.Proxy{api, web}, e: identity.Evidence{Tasks: []string{"connect-proxy-web", "connect-proxy-api"}}, want: "api web"},
		{name: "the second one's task is on its way", proxies: []registration.Proxy{api, web},
			e: identity.Evidence{Tasks: []string{"connect-proxy-web"}, Claims: counted("api", "web")}, want: "api web"},
		{name: "... and does not come", proxies: []registration.Proxy{api, web},
			e: identity.Evidence{Tasks: []string{"connect-proxy-web"}, Claims: counted("api", "web"), Settled: true}, want: "web"},
		{name: "a job that is not in the mesh", proxies: []registration.Proxy{at(evil, 8080)}, e: identity.Evidence{Tasks: []string{"app"}}},
		{name: "... while nothing of it ran yet", proxies: []registration.Proxy{at(evil, 8080)}, e: identity.Evidence{Tasks: []string{"app"}, Claims: counted("evil"), Settled: true}},
		{name: "a proxy's task that the job names", proxies: []registration.Proxy{web}, e: identity.Evidence{Tasks: []string{"app", "envoy"}}, listens: []uint16{20001}, want: "web"},
		{name: "... and another's at the same port", proxies: []registration.Proxy{evil, web}, e: identity.Evidence{Tasks: []string{"app", "envoy"}, Claims: counted("web"), Settled: true},
			listens: []uint16{20001}, want: "web"},
		{name: "... of which none was first", proxies: []registration.Proxy{evil, web}, e: identity.Evidence{Tasks: []string{"app", "envoy"}}, listens: []uint16{20001}},
		{name: "two at one port before anything runs", proxies: []registration.Proxy{evil, web}},
		{name: "two whose tasks no name tells", proxies: []registration.Proxy{api, web}, listens: []uint16{20001, 8080}, want: "api web"},
		{name: "libcni knows nothing, and nothing is seen to run", proxies: []registration.Proxy{web}, uncached: true},
		{name: "... and its task runs", proxies: []registration.Proxy{web}, uncached: true, e: identity.Evidence{Tasks: []string{"connect-proxy-web"}}, want: "web"},
		{name: "by the address, and it listens", proxies: []registration.Proxy{free(web)}, listens: []uint16{20001}, want: "web"},
		{name: "by the address, and nobody listens", proxies: []registration.Proxy{free(web)}},
		{name: "by the address of an allocation that runs another's", proxies: []registration.Proxy{free(evil), web}, e: identity.Evidence{Tasks: []string{"connect-proxy-web"}},
			listens: []uint16{20001}, want: "web"},
		{name: "a gateway of the job's name", proxies: []registration.Proxy{edge}, gateway: true, want: "edge"},
		{name: "... and one that names its administration by the address", proxies: []registration.Proxy{edge, intruder}, gateway: true, listens: []uint16{8181, 19000}, want: "edge"},
		{name: "two gateways by the address", proxies: []registration.Proxy{edge, intruder}, e: identity.Evidence{Claims: counted("edge")}, listens: []uint16{8181, 19000}, want: "edge"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := desired.Allocation{Attachment: found(), Cached: !c.uncached, Record: c.known, Proxies: c.proxies}
			if c.gateway {
				s.Job.ID = "edge"
			}
			if c.uncached {
				s.Ports = nil
			}
			c.e.Listens = func() []uint16 { return c.listens }
			got, others := c.e.Judge(s, catalog.Data{})
			var ids []string
			for _, p := range got {
				ids = append(ids, p.ID)
			}
			slices.Sort(ids)
			if diff := cmp.Diff(c.want, strings.Join(ids, " ")); diff != "" {
				t.Errorf("what counts (-want +got):\n%s", diff)
			}
			if len(got)+len(others) != len(c.proxies) {
				t.Errorf("%d count, %d problems, of %d", len(got), len(others), len(c.proxies))
			}
			for id, problem := range others {
				if !strings.Contains(problem.What, exampleAlloc) || !strings.Contains(problem.What, id) || problem.Remedy == "" {
					t.Errorf("problem %q: want allocation, registration and a remedy", problem)
				}
			}
		})
	}
}

// Whoever may register a service of his own in Consul gives it the ID of another's
// allocation: nothing changes there, and it is a problem.
func TestRegistrationOfAnotherChangesNothing(t *testing.T) {
	n := newNode(t)
	n.ports = append(n.ports, mapped(20002))
	id, ns := numbered(1), test.NewNetNS(t)
	key := workload.AttachmentID{ContainerID: id, IfName: "eth0"}
	n.cached(id, ns.Path, "")
	plain, bystander := numbered(2), test.NewNetNS(t)
	n.cached(plain, bystander.Path, "")
	runsTask(t, plain, "app", bystander.Path)
	registration := func(alloc, name string, port int, proxy map[string]any) (string, any) {
		return fmt.Sprintf("_nomad-task-%s-group-g-%s-80-sidecar-proxy", alloc, name),
			map[string]any{"Kind": "connect-proxy", "Service": name + "-sidecar-proxy", "Port": port, "Proxy": proxy, "Meta": map[string]any{"weir-guard": "enforce"}}
	}
	services := make(map[string]any)
	answer := func() {
		data, err := json.Marshal(services)
		if err != nil {
			t.Fatal(err)
		}
		n.fake.answers(say(200, string(data)))
	}
	webID, web := registration(id, "web", 20001, map[string]any{"DestinationServiceName": "web"})
	services[webID] = web
	answer()
	runsTask(t, id, "connect-proxy-web", ns.Path)
	n.run()
	n.eventually(id, api.StateManaged)
	meshConfig := func() workload.MeshConfig {
		list, err := n.Records()
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(list, func(k inspect.Record) bool { return k.Key == key })
		if i < 0 {
			t.Fatal("it is not on record")
		}
		return list[i].MeshConfig
	}
	test.Eventually(t, func() error {
		if o := meshConfig(); o.InboundPort != 20001 || o.Guard != workload.GuardEnforce {
			return fmt.Errorf("it is %+v", o)
		}
		return nil
	}, "its own registration to be in force")
	before := meshConfig()
	for _, port := range []int{20001, 20002, 8080} {
		for _, of := range []string{id, plain} {
			evilID, evil := registration(of, fmt.Sprintf("evil%d", port), port, map[string]any{
				"DestinationServiceName": "evil", "Upstreams": []any{map[string]any{"DestinationName": "db", "LocalBindPort": 9999}},
				"Expose": map[string]any{"Paths": []any{map[string]any{"ListenerPort": 8080}}}})
			services[evilID] = evil
		}
	}
	n.fake.set(&n.fake.chain, say(200, `{"Chain":{"AutoVirtualIPs":["240.0.0.1"]}}`))
	answer()
	n.agent.consul.Wake()
	began := time.Now()
	test.Eventually(t, func() error {
		told := 0
		for _, problem := range n.agent.Status().Problems {
			if slices.Contains([]string{health.ProblemForeignRegistration.String(), health.ProblemUnprovenRegistration.String()}, problem.Code) && strings.Contains(problem.Subject, "evil") {
				told++
			}
		}
		if told != 6 {
			return fmt.Errorf("after %s %d of 6 are told: %q", time.Since(began), told, n.agent.Status().Problems)
		}
		return nil
	}, "each to be a problem")
	if diff := cmp.Diff(before, meshConfig(), sameAddrs()); diff != "" {
		t.Errorf("what is in force changed (-before +after):\n%s", diff)
	}
	if list, err := n.Records(); err != nil || len(list) != 1 {
		t.Errorf("on record: %+v, %v; want nothing of the allocation that is not in the mesh", list, err)
	}
}

// A look that fails takes nothing away from who counts: it shows nothing new.
func TestFailedLookWithdrawsNoRegistration(t *testing.T) {
	test.Need(t, test.Root)
	inside, silent := test.NewNetNS(t), test.NewNetNS(t)
	inside.Do(func() {
		listener, err := net.Listen("tcp4", "127.0.0.1:20001")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = listener.Close() })
	})
	var m identity.Memory
	now := time.Now()
	for _, step := range []struct {
		netns     string
		withdrawn bool
	}{{inside.Path, false}, {test.WriteFile(t, filepath.Join(t.TempDir(), "netns"), ""), false}, {silent.Path, true}} {
		now = now.Add(2 * api.SettleTime)
		s := desired.Allocation{Attachment: found(), Cached: true, Proxies: []registration.Proxy{sidecar(func(p *registration.Proxy) { p.AllocID = "" })}}
		s.NetNS = step.netns
		m.Remember(s.Proxies, now)
		m.Saw([]string{"app"}, now)
		problems := m.Judge(&s, catalog.Data{}, uint32(os.Getuid()), now)
		if s.Withdrawn != step.withdrawn || (len(s.Proxies) == 0) != step.withdrawn {
			t.Errorf("%s: withdrawn %v, %d count: %v", step.netns, s.Withdrawn, len(s.Proxies), problems)
		}
	}
}

// Nor does it make anybody count: what was seen to run is still taken to run.
func TestFailedLookLetsNoRegistrationCount(t *testing.T) {
	test.Need(t, test.Root)
	silent := test.NewNetNS(t)
	var m identity.Memory
	now := time.Now()
	for _, cgroups := range []map[string][]string{{silent.Path: {exampleAlloc + ".app.scope"}}, nil} {
		s := desired.Allocation{Attachment: found(), Cached: true, Proxies: []registration.Proxy{sidecar()}}
		s.NetNS = silent.Path
		m.Remember(s.Proxies, now)
		m.Look(s, cgroups, discover.Containers{}, now)
		m.Judge(&s, catalog.Data{}, 101, now)
		if len(s.Proxies) > 0 {
			t.Errorf("with cgroups %v it counts, and only a task of another name runs", cgroups)
		}
	}
}
