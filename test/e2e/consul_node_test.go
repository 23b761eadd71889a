// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/weirmesh/weir/agent"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/consul"
)

// meshNode is a node with a real Consul, a real libcni and an agent.
type meshNode struct {
	*redirect.Datapath
	t       *testing.T
	consul  *consul.Server
	cgroup  *test.Cgroup
	config  configfile.Config
	dir     string
	allocs  int
	log     *lockedBuffer
	stop    func()
	outside *test.NetNS
	plugins string      // other ones than Weir's, for what is allocated next; empty: Weir's
	jobArgs [][2]string // of jobs with transparent_proxy that are allocated next
}

// lockedBuffer is the agent's log.
type lockedBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// newMeshNode makes a node whose Consul is reached by TCP.
func newMeshNode(t *testing.T, acls bool, options ...consul.Option) *meshNode {
	t.Helper()
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	return makeMeshNode(t, test.NewNetNS(t), consul.Start(t, acls, options...))
}

// newConsulNode makes a node whose Consul is where a node's is: its DNS can be
// asked by allocations, and it can check their health. The agent reaches it by a
// Unix socket.
func newConsulNode(t *testing.T) *meshNode {
	t.Helper()
	test.Need(t, test.Root, test.CgroupV2, test.BPF, test.Tool("ip"))
	nodeAddr, outside := netip.AddrFrom4([4]byte{10, 88, 0, 1}), test.NewNetNS(t)
	ip(t, outside, "addr add %s dev lo", nodeAddr)
	return makeMeshNode(t, outside, consul.Start(t, false, consul.In(outside, nodeAddr)))
}

// ip calls that command in the namespace.
func ip(t *testing.T, ns *test.NetNS, format string, args ...any) {
	t.Helper()
	line := fmt.Sprintf(format, args...)
	ns.Do(func() {
		if out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
			t.Errorf("ip %s: %v: %s", line, err, out)
		}
	})
}

func makeMeshNode(t *testing.T, outside *test.NetNS, server *consul.Server) *meshNode {
	t.Helper()
	n := &meshNode{t: t, consul: server, cgroup: test.NewCgroup(t), dir: t.TempDir(), log: &lockedBuffer{}, outside: outside}
	n.outside.Do(func() {
		for _, path := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
			if err := os.WriteFile(path, []byte("1"), 0o644); err != nil {
				t.Error(err)
			}
		}
	})
	n.config = configfile.DefaultConfig()
	n.config.PinDir, n.config.StateDir = filepath.Join(test.BPFFS(t), "weir"), filepath.Join(n.dir, "state")
	n.config.CgroupRoot = n.cgroup.Path
	n.config.CNI.CacheDir = filepath.Join(n.dir, "cni")
	n.config.Consul.Address = n.consul.Address
	n.Datapath = redirect.New(n.config.Paths())
	t.Cleanup(func() {
		if _, err := n.Unload(); err != nil {
			t.Errorf("unload: %v", err)
		}
		if t.Failed() {
			t.Logf("the agent's log:\n%s", n.log)
		}
	})
	bin := filepath.Join(n.dir, "bin")
	if err := os.Mkdir(bin, 0o700); err != nil {
		t.Fatal(err)
	}
	buildPlugin(t, filepath.Join(bin, "consul-cni"))
	// The first plugin of the chain: the test has made the interface already,
	// and this tells so.
	script := "#!/bin/sh\n[ \"$CNI_COMMAND\" = ADD ] && cat \"$CNI_NETNS.result\"\nexit 0\n"
	if err := os.WriteFile(filepath.Join(bin, "made"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return n
}

// runAgent starts an agent, which ends with the test or at stop.
func (n *meshNode) runAgent() {
	n.t.Helper()
	instance, err := agent.New(n.config, agent.Options{Log: slog.New(slog.NewTextHandler(n.log, nil))})
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- instance.Run(ctx) }()
	var once sync.Once
	n.stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					n.t.Errorf("agent: %v", err)
				}
			case <-time.After(30 * time.Second):
				n.t.Error("the agent does not end")
			}
		})
	}
	n.t.Cleanup(n.stop)
}

// status is what the agent tells on its socket.
func (n *meshNode) status() (api.Status, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return api.ReadStatus(ctx, n.config.StateDir)
}

// allocID is the ID of the node's allocation of that number.
func allocID(number int) string { return fmt.Sprintf("b412a0b1-e285-703a-01ba-%012d", number) }

// meshAlloc is one allocation of Nomad's.
type meshAlloc struct {
	node  *meshNode
	ns    *test.NetNS
	id    string
	addr  netip.Addr // IPv4; gate is the host's end
	gate  netip.Addr
	addr6 netip.Addr
	list  *libcni.NetworkConfigList
	rt    *libcni.RuntimeConf
	cni   *libcni.CNIConfig

	sidecarPorts map[string]any // mapped ports, by service
	gatewayTask  *test.Client   // under the name that Nomad injects
}

// allocate makes an allocation's namespace and calls libcni as Nomad does.
// mesh is Consul's redirection config, or "" for a job without
// transparent_proxy, for which Nomad calls no plugin of ours.
func (n *meshNode) allocate(mesh string, ports ...map[string]any) *meshAlloc {
	n.t.Helper()
	return n.allocateAs(allocID(n.allocs+1), fmt.Sprintf("job-%d", n.allocs+1), mesh, ports...)
}

func (n *meshNode) allocateAs(id, job, mesh string, ports ...map[string]any) *meshAlloc {
	n.t.Helper()
	n.allocs++
	a := &meshAlloc{
		node: n, ns: test.NewNetNS(n.t), id: id,
		addr: netip.AddrFrom4([4]byte{10, 88, byte(n.allocs), 2}), gate: netip.AddrFrom4([4]byte{10, 88, byte(n.allocs), 1}),
		addr6: netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x88, 7: byte(n.allocs), 15: 2}),
	}
	both := func(v4, v6 netip.Addr) []netip.Prefix {
		return []netip.Prefix{netip.PrefixFrom(v4, 24), netip.PrefixFrom(v6, 64)}
	}
	test.Veth(n.t,
		test.VethEnd{NetNS: n.outside, Name: fmt.Sprintf("veth%d", n.allocs), Addrs: both(a.gate, a.addr6.Prev())},
		test.VethEnd{NetNS: a.ns, Addrs: both(a.addr, a.addr6), DefaultRoute: true})
	result := fmt.Sprintf(`{"cniVersion":"0.4.0","interfaces":[{"name":"eth0","sandbox":%q}],"ips":[`+
		`{"version":"4","interface":0,"address":"%s/24"},{"version":"6","interface":0,"address":"%s/64"}]}`, a.ns.Path, a.addr, a.addr6)
	if err := os.WriteFile(a.ns.Path+".result", []byte(result), 0o600); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { os.Remove(a.ns.Path + ".result") })
	plugins := `{"type":"made","capabilities":{"portMappings":true}}`
	args := [][2]string{
		{"IgnoreUnknown", "true"}, {"NOMAD_ALLOC_ID", a.id}, {"NOMAD_JOB_ID", job}, {"NOMAD_GROUP_NAME", "g"},
	}
	if mesh != "" {
		plugins += fmt.Sprintf(`,{"type":"consul-cni","jobArgs":["guard","exclude-inbound-ports"],"pinDir":%q,"stateDir":%q,"cgroupRoot":%q}`, n.config.PinDir, n.config.StateDir, n.config.CgroupRoot)
		args = append(append(args, [2]string{"CONSUL_IPTABLES_CONFIG", mesh}), n.jobArgs...)
	}
	list, err := libcni.ConfListFromBytes([]byte(`{"cniVersion":"0.4.0","name":"nomad","plugins":[` + plugins + `]}`))
	if err != nil {
		n.t.Fatal(err)
	}
	mappings := make([]any, 0, len(ports))
	for _, port := range ports {
		mappings = append(mappings, port)
	}
	a.list = list
	a.rt = &libcni.RuntimeConf{
		ContainerID: a.id, NetNS: a.ns.Path, IfName: "eth0", Args: args, CapabilityArgs: map[string]any{"portMappings": mappings},
	}
	a.cni = libcni.NewCNIConfigWithCacheDir([]string{cmp.Or(n.plugins, filepath.Join(n.dir, "bin"))}, n.config.CNI.CacheDir, nil)
	if _, err := a.cni.AddNetworkList(context.Background(), list, a.rt); err != nil {
		n.t.Fatalf("add network: %v", err)
	}
	return a
}

func (a *meshAlloc) end() {
	a.node.t.Helper()
	if err := a.cni.DelNetworkList(context.Background(), a.list, a.rt); err != nil {
		a.node.t.Fatalf("delete network: %v", err)
	}
}

func (a *meshAlloc) spec(uid uint32) test.Spec {
	return test.Spec{NetNS: a.ns, Cgroup: a.node.cgroup, UID: uid, GID: uid}
}

// known is what is on record of the allocation.
func (a *meshAlloc) known() (inspect.Record, error) {
	list, err := a.node.Records()
	if err != nil {
		return inspect.Record{}, err
	}
	for _, k := range list {
		if k.Key.ContainerID == a.id {
			return k, nil
		}
	}
	return inspect.Record{}, fmt.Errorf("allocation %s: %w", a.id, store.ErrUnknown)
}

// workload is what the kernel has of the allocation.
func (a *meshAlloc) workload() (inspect.WorkloadStatus, error) {
	list, err := a.node.Workloads()
	if err != nil {
		return inspect.WorkloadStatus{}, err
	}
	for _, w := range list {
		if w.ID == a.id {
			return w, nil
		}
	}
	return inspect.WorkloadStatus{}, fmt.Errorf("allocation %s: %w", a.id, store.ErrUnknown)
}

// view is what the agent says of the allocation.
func (a *meshAlloc) view() (api.WorkloadView, error) {
	status, err := a.node.status()
	if err != nil {
		return api.WorkloadView{}, err
	}
	for _, w := range status.Workloads {
		if w.ID == a.id {
			return w, nil
		}
	}
	return api.WorkloadView{}, fmt.Errorf("the agent does not show allocation %s", a.id)
}

// eventually waits until the mesh configuration on record passes the check.
func (a *meshAlloc) eventually(what string, check func(workload.MeshConfig) bool) {
	a.node.t.Helper()
	test.Eventually(a.node.t, func() error {
		known, err := a.known()
		// The record tells of a change before the kernel has all of it.
		if err == nil && (!known.Complete || !check(known.MeshConfig)) {
			err = fmt.Errorf("mesh configuration is %+v, in force: %v", known.MeshConfig, known.Complete)
		}
		return err
	}, what)
}

// object is JSON of Consul's.
type object = map[string]any

// register registers a service of the allocation with its sidecar, by the IDs
// that Nomad gives.
func (a *meshAlloc) register(name string, sidecar object, checks ...object) (proxyID string) {
	a.node.t.Helper()
	a.mapPort(name, sidecar["Port"])
	return a.registerInConsul(name, sidecar, checks...)
}

// registerInConsul registers alone: the allocation has the sidecar's port from its
// beginning, or does not run yet.
func (a *meshAlloc) registerInConsul(name string, sidecar object, checks ...object) (proxyID string) {
	a.node.t.Helper()
	id := serviceID(a.id, name)
	if sidecar["Address"] == nil {
		sidecar["Address"] = a.addr.String()
	}
	if sidecar["Checks"] == nil {
		// In place of Consul's own, which dials the proxy from wherever Consul is.
		sidecar["Checks"] = []object{{"Name": "alias of " + name, "AliasService": id}}
	}
	a.node.consul.Register(object{
		"Name": name, "ID": id, "Address": a.addr.String(), "Port": 8080, "Checks": checks, "Connect": object{"SidecarService": sidecar},
	})
	return id + "-sidecar-proxy"
}

// mapPort adds the port that Nomad gives to a sidecar, the same on the host and in
// the namespace, to what libcni remembers.
func (a *meshAlloc) mapPort(service string, port any) {
	a.node.t.Helper()
	path := filepath.Join(a.node.config.CNI.CacheDir, "results", "nomad-"+a.id+"-eth0")
	data, err := os.ReadFile(path)
	if err != nil {
		a.node.t.Fatal(err)
	}
	var entry map[string]any
	if err := json.Unmarshal(data, &entry); err != nil {
		a.node.t.Fatal(err)
	}
	if a.sidecarPorts == nil {
		a.sidecarPorts = make(map[string]any)
	}
	a.sidecarPorts[service] = port
	mappings := slices.Clone(a.rt.CapabilityArgs["portMappings"].([]any))
	for _, port := range a.sidecarPorts {
		mappings = append(mappings, object{"hostPort": port, "containerPort": port, "protocol": "tcp"})
	}
	entry["capabilityArgs"] = object{"portMappings": mappings}
	if data, err = json.Marshal(entry); err != nil {
		a.node.t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		a.node.t.Fatal(err)
	}
}

// serviceID is the ID that Nomad gives to a service.
func serviceID(allocID, name string) string {
	return fmt.Sprintf("_nomad-task-%s-group-g-%s-8080", allocID, name)
}

// virtualIP is the address by which the mesh knows the service.
func (n *meshNode) virtualIP(name string) (addr netip.Addr) {
	n.t.Helper()
	test.Eventually(n.t, func() error {
		var chain struct {
			Chain struct{ AutoVirtualIPs []string }
		}
		n.consul.Get("/v1/discovery-chain/"+name, &chain)
		if len(chain.Chain.AutoVirtualIPs) == 0 {
			return fmt.Errorf("%s has none yet", name)
		}
		var err error
		addr, err = netip.ParseAddr(chain.Chain.AutoVirtualIPs[0])
		return err
	}, "a virtual IP")
	return addr
}
