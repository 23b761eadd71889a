// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/consul"
)

const (
	proxyUID    = 101
	taskPort    = 8080
	inboundPort = 21000 // of the proxies, as Consul has it
)

// privateNode is a node with a real Consul on its loopback and allocations whose
// namespaces are mounted while the agent runs.
type privateNode struct {
	*machine
	consul *consul.Server
	made   int

	plain, transparent, nft, legacy *privateAlloc

	proxy *test.ServerProcess // of the transparent one
}

// privateAlloc is an allocation of Nomad's.
type privateAlloc struct {
	id   string
	ns   *test.NetNS
	addr netip.Addr
	path string // of the namespace, on the node
}

func (a *privateAlloc) at(port uint16) string { return netip.AddrPortFrom(a.addr, port).String() }

func newPrivateNode(t *testing.T) *privateNode {
	t.Helper()
	test.Need(t, test.Tool("ip"), test.Tool("iptables-nft"), test.Tool("iptables-legacy"))
	n := &privateNode{machine: bootMachine(t)}
	n.consul = consul.Start(t, false, consul.In(n.net, netip.AddrFrom4([4]byte{127, 0, 0, 1})), func(s *consul.Server, config map[string]any) {
		config["addresses"].(map[string]any)["http"] = s.Address + " 127.0.0.1"
		config["ports"].(map[string]any)["http"] = 8500 // where the agent looks for it
	})
	n.must(t, "systemctl", "stop", unitName)
	n.must(t, "weir", "unload", "-force")
	return n
}

// allocate makes the allocations. Their tasks and proxies run before the agent
// hears of them.
func (n *privateNode) allocate(t *testing.T) {
	t.Helper()
	n.plain, n.transparent, n.nft, n.legacy = n.alloc(t), n.alloc(t), n.alloc(t), n.alloc(t)
	for _, a := range []*privateAlloc{n.plain, n.transparent} {
		spec := test.Spec{NetNS: a.ns, Cgroup: test.NewCgroup(t), UID: proxyUID, GID: proxyUID, PIDNS: n.first}
		n.proxy = test.EchoProcess(t, spec, "tcp4", fmt.Sprintf("0.0.0.0:%d", inboundPort))
		test.Echo(t, a.ns, "tcp4", fmt.Sprintf("0.0.0.0:%d", taskPort))
		if err := n.dial(a, taskPort); err != nil {
			t.Fatalf("reach an allocation that nobody guards: %v", err)
		}
	}
	n.consulRules(t, n.nft, "iptables-nft")
	n.consulRules(t, n.legacy, "iptables-legacy")
	for _, a := range []*privateAlloc{n.plain, n.transparent, n.nft, n.legacy} {
		n.mount(t, a)
	}
	// Nomad passes port 0 where the job names one itself: only Consul has it.
	const mesh = `{"ProxyUserID":"101","ProxyOutboundPort":15001,"ProxyInboundPort":0}`
	n.plugin(t, n.transparent, mesh)
	n.result(t, n.plain, "")
	for _, a := range []*privateAlloc{n.transparent, n.nft, n.legacy} {
		n.result(t, a, mesh)
	}
	n.register(t, n.plain, map[string]any{})
	n.register(t, n.transparent, map[string]any{"Mode": "transparent"})
}

// dial tries a port of the allocation from the node.
func (n *privateNode) dial(a *privateAlloc, port uint16) error {
	_, err := test.Ask(n.net, "tcp", a.at(port))
	return err
}

// alloc makes a namespace that is reached from the node.
func (n *privateNode) alloc(t *testing.T) *privateAlloc {
	t.Helper()
	n.made++
	a := &privateAlloc{
		id: fmt.Sprintf("b412a0b1-e285-703a-01ba-%012d", n.made), ns: test.NewNetNS(t),
		addr: netip.AddrFrom4([4]byte{10, 66, byte(n.made), 2}),
	}
	a.path = "/var/run/netns/" + a.id
	test.Veth(t,
		test.VethEnd{NetNS: n.net, Name: fmt.Sprintf("veth%d", n.made), Addrs: []netip.Prefix{netip.PrefixFrom(a.addr.Prev(), 24)}},
		test.VethEnd{NetNS: a.ns, Addrs: []netip.Prefix{netip.PrefixFrom(a.addr, 24)}, DefaultRoute: true})
	return a
}

// mount makes the namespace known to the node where Nomad has its own, in the same
// way as Nomad does.
func (n *privateNode) mount(t *testing.T, a *privateAlloc) {
	t.Helper()
	attach := exec.Command("nsenter", "-t", fmt.Sprint(n.first), "-m", "-p", "-r", "--net="+a.ns.Path, "sh", "-c", `ip netns attach "$1" $$`, "sh", a.id)
	if out, err := attach.CombinedOutput(); err != nil {
		t.Fatalf("mount namespace: %v\n%s", err, out)
	}
	t.Cleanup(func() { n.must(t, "ip", "netns", "del", a.id) })
}

// consulRules has Consul's own engine redirect the namespace by one of the two
// iptables.
func (n *privateNode) consulRules(t *testing.T, a *privateAlloc, iptables string) {
	t.Helper()
	binary, err := consul.Find()
	if err != nil {
		t.Fatal(err)
	}
	target, err := exec.LookPath(iptables)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(target, filepath.Join(dir, "iptables")); err != nil {
		t.Fatal(err)
	}
	redirect := exec.Command(binary, "connect", "redirect-traffic", "-http-addr", n.consul.Address, "-proxy-uid", fmt.Sprint(proxyUID),
		"-proxy-inbound-port", fmt.Sprint(inboundPort), "-netns", a.ns.Path)
	redirect.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
	if out, err := redirect.CombinedOutput(); err != nil {
		t.Fatalf("redirect by %s: %v\n%s", iptables, err, out)
	}
}

// interfaces are what the plugins before Weir's made, as CNI writes it.
func (a *privateAlloc) interfaces() string {
	return fmt.Sprintf(`{"cniVersion":"0.4.0","interfaces":[{"name":"eth0","sandbox":%q}],"ips":[{"version":"4","interface":0,"address":"%s/24"}]}`, a.path, a.addr)
}

// plugin calls Weir's plugin as Nomad does: with all privileges, and not by the agent.
func (n *privateNode) plugin(t *testing.T, a *privateAlloc, mesh string) {
	t.Helper()
	network := fmt.Sprintf(`{"cniVersion":"0.4.0","name":"nomad","type":"consul-cni","prevResult":%s}`, a.interfaces())
	n.must(t, "env", "CNI_COMMAND=ADD", "CNI_PATH=/opt/cni", "CNI_IFNAME=eth0", "CNI_CONTAINERID="+a.id, "CNI_NETNS="+a.path,
		"CNI_ARGS=IgnoreUnknown=true;NOMAD_ALLOC_ID="+a.id+";NOMAD_JOB_ID=job;NOMAD_GROUP_NAME=g;CONSUL_IPTABLES_CONFIG="+mesh,
		"sh", "-c", `printf %s "$1" | /opt/cni/weir-cni`, "sh", network)
}

// result leaves what libcni does.
func (n *privateNode) result(t *testing.T, a *privateAlloc, mesh string) {
	t.Helper()
	args := [][2]string{{"IgnoreUnknown", "true"}, {"NOMAD_ALLOC_ID", a.id}, {"NOMAD_JOB_ID", "job"}, {"NOMAD_GROUP_NAME", "g"}}
	if mesh != "" {
		args = append(args, [2]string{"CONSUL_IPTABLES_CONFIG", mesh})
	}
	text, err := json.Marshal(map[string]any{
		"kind": "cniCacheV1", "containerId": a.id, "ifName": "eth0", "networkName": "nomad", "netns": a.path,
		"cniArgs": args, "result": json.RawMessage(a.interfaces()),
		"capabilityArgs": map[string]any{"portMappings": []map[string]any{{"hostPort": inboundPort, "containerPort": inboundPort, "protocol": "tcp"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(n.root, "var/lib/cni/results", "nomad-"+a.id+"-eth0")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(file); err != nil {
			t.Error(err)
		}
	})
}

// register registers a service and its sidecar by the IDs that Nomad gives.
func (n *privateNode) register(t *testing.T, a *privateAlloc, proxy map[string]any) {
	t.Helper()
	id := fmt.Sprintf("_nomad-task-%s-group-g-web-%d", a.id, taskPort)
	n.consul.Register(map[string]any{
		"Name": "web", "ID": id, "Address": a.addr.String(), "Port": taskPort,
		"Connect": map[string]any{"SidecarService": map[string]any{
			"Address": a.addr.String(), "Port": inboundPort, "Meta": map[string]string{"weir-guard": "enforce"}, "Proxy": proxy,
		}},
	})
	t.Cleanup(func() { n.consul.Deregister(id) })
}

// agentView is what the agent tells on its socket.
type agentView struct {
	DataPath string `json:"data_path"`
	Problems []health.Problem
	Consul   struct {
		InSync bool `json:"in_sync"`
		Error  string
	}
	Workloads []struct {
		ID, State string
		InSync    bool `json:"in_sync"`
		Problems  []health.Problem
	}
}

func (n *privateNode) view() (view agentView, err error) {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(n.root, "run/weir/agent.sock"))
		},
	}}
	response, err := client.Get("http://agent/v1/status")
	if err != nil {
		return view, err
	}
	defer response.Body.Close()
	return view, json.NewDecoder(response.Body).Decode(&view)
}
