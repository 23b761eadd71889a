// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// FuzzServices holds what anybody may register in Consul to one promise: whatever it
// says, what the agent makes of it for an allocation is a workload that the data
// path takes, with no weaker guard than the node's.
func FuzzServices(f *testing.F) {
	body, err := os.ReadFile("testdata/consul-1.22.2-services.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(body)
	f.Add([]byte(`{}`))
	f.Add([]byte(`null`))
	f.Add([]byte(`{"a":{"Kind":"connect-proxy","Port":-1,"Proxy":{"Upstreams":[{"LocalBindPort":70000},{"LocalBindAddress":"::ffff:1.2.3.4","LocalBindPort":1}]}},"b":7}`))
	f.Add([]byte(`{"g":{"Kind":"ingress-gateway","Port":8080,"Proxy":{"Config":{"envoy_gateway_bind_addresses":{"x":{"address":"0.0.0.0","port":1}},"bind_port":"15"}}}}`))
	f.Add([]byte(`{"foreign":{"Kind":"connect-proxy","Address":"172.26.64.14","Port":20001},"_nomad-task-11111111-2222-3333-4444-555555555555-group-api-web-1-sidecar-proxy":{"Kind":"connect-proxy","Address":"172.26.64.14","Port":2},"_nomad-task-` + exampleAlloc + `-group-api-web-1-sidecar-proxy":{"Kind":"connect-proxy","Address":"172.26.64.13","Port":3}}`))
	f.Add([]byte(`{"s":{"Kind":"connect-proxy","Port":1,"Meta":{"weir-guard":"off"},"Proxy":{"Mode":"transparent","TransparentProxy":{"OutboundListenerPort":1},"Expose":{"Paths":[{"ListenerPort":1}]}}}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		proxies, problems, err := registration.ParseServices(body, netip.MustParseAddr("127.0.0.1"))
		if err != nil {
			if len(proxies)+len(problems) > 0 {
				t.Errorf("beside an error are %d proxies and %d problems", len(proxies), len(problems))
			}
			return
		}
		for _, problem := range problems {
			if !strings.Contains(problem, "registration ") {
				t.Errorf("the problem %q names no registration", problem)
			}
		}
		a := found()
		for _, p := range desired.ProxiesOf(catalog.Snapshot{Proxies: catalog.ByAllocation(proxies)}, a) {
			runs := p.IsGateway() && p.Self.Name == a.Job.ID // without an address, as what its job is for
			if p.AllocID != a.Job.AllocID && !slices.Contains(a.Addresses, p.Address.Unmap()) && (p.AllocID != "" || p.Address.IsValid() || !runs) {
				t.Errorf("the allocation takes a registration that is not its own: %+v", p)
			}
		}
		const task = "connect-proxy-web" // the only one that is injected there
		seen := identity.Evidence{Tasks: []string{"web", task}, Listens: func() []uint16 { return []uint16{1, 20001} }}
		counted, _ := seen.Judge(desired.Allocation{Attachment: a, Live: true, Cached: true, Proxies: proxies}, catalog.Data{})
		for _, p := range counted {
			if !registration.Injected(task, []registration.Proxy{p}) && !desired.RunsGateway(catalog.Data{}, a, p) {
				t.Errorf("a registration counts that is not of the task %s: %+v", task, p)
			}
		}
		for _, mode := range []workload.Mode{"", workload.ModeTransparent, workload.ModeDirect, workload.ModeGateway} {
			// One by one, as one registration must not spoil another's allocation, and all.
			for i := range len(proxies) + 1 {
				own := proxies
				if i < len(proxies) {
					own = proxies[i : i+1]
				}
				s := desired.Allocation{Attachment: found(), Live: true, Proxies: own}
				request := workload.Request{Mode: mode, ProxyUID: 101, Addresses: s.Addresses}
				if mode == workload.ModeTransparent {
					request.InboundPort, request.OutboundPort = 20000, 15001
				}
				if mode != "" {
					s.Record = &inspect.Record{Key: s.Key, Request: request, Complete: true}
				}
				plan := desired.For(s, catalog.Data{}, desired.Policy{Guard: workload.GuardAudit, ProxyUID: 101})
				if plan.MeshConfig == nil {
					continue
				}
				if plan.Add != nil {
					request = *plan.Add
				}
				planned := workload.Merge(request, *plan.MeshConfig)
				if err := planned.Validate(); err != nil {
					t.Errorf("mode %q: the data path refuses what is made of it: %v\n%+v", mode, err, *plan.MeshConfig)
				}
				if planned.Guard != workload.GuardAudit && planned.Guard != workload.GuardEnforce {
					t.Errorf("mode %q: the guard is %q", mode, planned.Guard)
				}
			}
		}
	})
}

// FuzzCache holds files of libcni's cache to theirs: one is an allocation of Nomad's
// with a key and plain addresses, or none, or an error. What a lost record is made of
// is refused by the name of a key, or is a request that the data path takes.
func FuzzCache(f *testing.F) {
	f.Add([]byte(`{"kind":"cniCacheV1","containerId":"` + exampleAlloc + `","ifName":"eth0","networkName":"nomad","netns":"/var/run/netns/x",
		"cniArgs":[["IgnoreUnknown","true"],["NOMAD_JOB_ID","j1"],["NOMAD_ALLOC_ID","` + exampleAlloc + `"],["CONSUL_IPTABLES_CONFIG","{}"],["weir.mode","direct"]],
		"capabilityArgs":{"portMappings":[{"hostPort":1,"containerPort":2,"protocol":"tcp"}]},
		"result":{"interfaces":[{"name":"eth0","sandbox":"/var/run/netns/x"}],"ips":[{"address":"172.26.64.2/20","interface":0},{"address":"::ffff:1.2.3.4/128","interface":-1}]}}`))
	lost := func(args, config string) {
		f.Add(fmt.Appendf(nil, `{"kind":"cniCacheV1","containerId":"c","ifName":"eth0","networkName":"weir","config":%q,"cniArgs":[["NOMAD_ALLOC_ID","x"],%s],`+
			`"result":{"ips":[{"address":"172.26.64.2/20"}]}}`, base64.StdEncoding.EncodeToString([]byte(config)), args))
	}
	lost(`["CONSUL_IPTABLES_CONFIG","{\"ProxyUserID\":\"101\",\"ProxyInboundPort\":20000,\"ProxyOutboundPort\":15001}"]`, `{"name":"weir","plugins":[{"type":"bridge"},{"type":"weir"}]}`)
	lost(`["weir.mode","transparent"],["weir.inbound-port","20000"]`, `{"name":"weir","type":"consul-cni","jobArgs":["mode","inbound-port"],"consulExclusions":true}`)
	lost(`["weir.mode","direct"],["weir.guard","off"]`, `{"plugins":[{"type":"weir","jobArgs":"x","forward":7,"configDir":"y"}]}`)
	f.Add([]byte(`{"kind":"cniCacheV1","containerId":"c","ifName":"i","cniArgs":[["a"],["NOMAD_ALLOC_ID","x","y"]]}`))
	f.Add([]byte(`{"kind":"cniCacheV1","containerId":"../../etc","ifName":"/","cniArgs":[["NOMAD_ALLOC_ID","x"]],"result":{"ips":[{"address":"fe80::1%eth0/64","interface":9}]}}`))
	f.Add([]byte(`[]`))
	policy := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		a, ok, err := discover.ParseCache(data)
		if err != nil || !ok {
			if err != nil && ok {
				t.Error("an error beside an allocation")
			}
			return
		}
		if a.Job.AllocID == "" || a.Key.ContainerID == "" || a.Key.IfName == "" {
			t.Errorf("an allocation without a name: %+v", a)
		}
		for _, addr := range a.Addresses {
			if !addr.IsValid() || addr.Is4In6() || addr.Zone() != "" {
				t.Errorf("address %s is not as the data path has it", addr)
			}
		}
		asked, err := desired.LostRequest(a, a.Addresses, policy)
		if err == nil {
			err = workload.Merge(*asked, workload.MeshConfig{}).Validate()
		} else if namesWhatIsWrong(err, a) {
			return
		}
		if err != nil {
			t.Errorf("%q: the data path would refuse it, or the error names no key: %v", data, err)
		}
	})
}

// namesWhatIsWrong reports an error that says which argument, which key of the network,
// or which part of libcni's result an allocation cannot be restored of. Where arguments
// contradict each other they are told by their values.
func namesWhatIsWrong(err error, a discover.Attachment) bool {
	names := []string{"weir.", "CONSUL_IPTABLES_CONFIG", "CONSUL_NFTABLES_CONFIG", "libcni's result", "jobArgs", "consulExclusions", "configDir", "forward"}
	for _, arg := range a.Args.Own {
		if arg.Value != "" {
			names = append(names, arg.Value)
		}
	}
	return slices.ContainsFunc(names, func(name string) bool { return strings.Contains(err.Error(), name) })
}

// FuzzConfig holds the agent's HCL to theirs: a file is refused with its name, or
// what it says is checked without a fault of the checks.
func FuzzConfig(f *testing.F) {
	for _, seed := range []string{
		"", `guard { default = "enforce" }`, `cni { job_args = ["mode", "garud"] }`, `consul { address = "https://[::1]:8501" }`,
		`flows { memory = "-1" history = "" }`, `guard = 7`, `pin_dir = "x"`, `docker { socket = "" }` + "\n" + `docker {}`, "telemetry { listen = \"\xff\" }",
		`proxy { default_uid = -1 }`, `log_level = "${path}"`, `guard { forward = true`,
	} {
		f.Add(seed)
	}
	path := filepath.Join(f.TempDir(), "weir.hcl")
	f.Fuzz(func(t *testing.T, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		config, err := configfile.ReadConfig(path, func(string) string { return "" })
		if err != nil {
			if !strings.Contains(err.Error(), path) {
				t.Errorf("%q: the error names no file: %v", text, err)
			}
			return
		}
		err = config.Validate()
		if err == nil && !filepath.IsAbs(config.StateDir) {
			t.Errorf("%q: a state directory of %q is taken", text, config.StateDir)
		}
		if err == nil {
			return
		}
		for line := range strings.Lines(strings.TrimPrefix(err.Error(), "check configuration: ")) {
			key, _, _ := strings.Cut(line, " ")
			if parts := strings.Split(key, "."); !strings.Contains(text, parts[len(parts)-1]) {
				t.Errorf("%q: %q names no key of the file", text, line)
			}
		}
	})
}

// FuzzCgroupNames holds the names of cgroups and containers, which a task may choose
// below its own: a task is only ever told by the first part of the path that is the
// allocation's own.
func FuzzCgroupNames(f *testing.F) {
	container := strings.Repeat("ab", 32)
	known := discover.Containers{Allocs: map[string]string{container: exampleAlloc}, Tasks: map[string]string{container: "web"}}
	for _, seed := range []string{
		"/nomad.slice/share.slice/" + exampleAlloc + ".web.scope", "/docker/" + container, "/system.slice/docker-" + container + ".scope/x",
		"/nomad.slice/11111111-2222-3333-4444-555555555555.web.scope/" + exampleAlloc + ".connect-proxy-web.scope", "/" + exampleAlloc + "..scope", "////",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, cgroup string) {
		task := discover.TaskOf(cgroup, exampleAlloc, known)
		if task == "" {
			return
		}
		parts := strings.Split(cgroup, "/")
		first := slices.IndexFunc(parts, func(part string) bool {
			_, _, scope := discover.ScopeOf(part)
			return scope || known.Allocs[discover.ContainerOf(part)] != ""
		})
		if first < 0 || !strings.Contains(parts[first], exampleAlloc) && discover.ContainerOf(parts[first]) != container {
			t.Errorf("%q: task %q by no part that is the allocation's", cgroup, task)
		}
		if strings.Contains(task, "/") {
			t.Errorf("%q: task %q", cgroup, task)
		}
		if pause, of := discover.NameOf([]string{"/" + task + "-" + exampleAlloc}, exampleAlloc); of != task && !pause {
			t.Errorf("%q: a container of task %q is told as %q", cgroup, task, of)
		}
	})
}

// What FuzzServices found: a registration with one port for both listeners made a
// workload that the data path refuses, told each pass as a step that fails.
func TestOnePortForBothListeners(t *testing.T) {
	for _, port := range []uint16{15001, 16001} {
		s := desired.Allocation{Attachment: found(), Live: true, Record: onRecord(workload.ModeTransparent),
			Proxies: []registration.Proxy{sidecar(func(p *registration.Proxy) { p.Transparent, p.Inbound, p.Outbound = true, port, port })}}
		got := desired.For(s, catalog.Data{}, desired.Policy{Guard: workload.GuardAudit})
		if got.MeshConfig.InboundPort != 0 || got.MeshConfig.OutboundPort != 0 {
			t.Errorf("port %d: the ports are %d and %d, want those from before", port, got.MeshConfig.InboundPort, got.MeshConfig.OutboundPort)
		}
		if !slices.ContainsFunc(got.Problems, func(p health.Problem) bool { return p.Code == health.ProblemProxyPorts.String() }) {
			t.Errorf("port %d: the problems are %v, none is proxy-ports", port, got.Problems)
		}
	}
}

// answering is a transport that gives one body to every question.
type answering []byte

func (a answering) RoundTrip(*http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(bytes.NewReader(a))}, nil
}

// FuzzDockerList holds Docker's list of containers, in which a task's own labels and
// names stand: it is refused as Docker's, or each container has the ID of one.
func FuzzDockerList(f *testing.F) {
	id := strings.Repeat("ab", 32)
	for _, seed := range []string{
		"", "[]", "{}", "null", `[{"Id":"` + id + `","Names":["/web-` + exampleAlloc + `"],"State":"running","Labels":{"com.hashicorp.nomad.alloc_id":"` + exampleAlloc + `"}}]`,
		`[{"Id":"x"},{"Id":"` + id + `","Names":null}`, `[7]`, `[[]]`, `[{"Id":"` + id + `"}] trailing`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		d := &discover.Docker{Client: &http.Client{Transport: answering(body)}}
		list, err := d.List(t.Context())
		if err != nil {
			if !strings.Contains(err.Error(), "ask Docker for /containers/json") {
				t.Errorf("%q: the error does not say who was asked what: %v", body, err)
			}
			return
		}
		for _, container := range list {
			if !discover.IsContainerID(container.ID) {
				t.Errorf("%q: a container %q", body, container.ID)
			}
			for _, name := range container.Names {
				if pause, task := discover.NameOf([]string{name}, exampleAlloc); pause && name != discover.PausePrefix+exampleAlloc && name != "/"+discover.PausePrefix+exampleAlloc || strings.Contains(task, "/") {
					t.Errorf("%q: name %q is the pause container's: %t, task %q", body, name, pause, task)
				}
			}
		}
	})
}
