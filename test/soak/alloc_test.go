// SPDX-License-Identifier: MPL-2.0

package soak

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/weirmesh/weir/test"
)

const (
	proxyUID     = 101
	taskUID      = 1000
	outboundPort = 15001
	upstreamPort = 9191
	pluginLimit  = 30 * time.Second // a call that takes longer is stuck
)

// alloc is one transparent allocation of Nomad's.
type alloc struct {
	*node
	number  int
	own     bool // network mode cni/weir, where the plugin builds all; else it is chained
	ns      *test.NetNS
	id      string
	inbound uint16 // the proxy's port, of the host too
	addr    netip.Addr
	addr6   netip.Addr // where the network has IPv6
	list    *libcni.NetworkConfigList
	rt      *libcni.RuntimeConf
	cni     *libcni.CNIConfig

	out, in, upstream *test.ServerProcess
	task              *test.Client
}

// newAlloc makes a namespace, with nothing in it where the plugin builds the network.
func (n *node) newAlloc(t *testing.T, own bool) *alloc {
	t.Helper()
	n.allocs++
	i := n.allocs
	a := &alloc{node: n, number: i, own: own, id: fmt.Sprintf("5049e2d1-5c4e-11f0-9b5e-%012d", i), inbound: uint16(20000 + i%10000)}
	name, plugins, version := "nomad", `{"type":"made","capabilities":{"portMappings":true}},{"type":"consul-cni",%s}`, "0.4.0"
	if own {
		name, plugins, version = "weir", `{"type":"weir","capabilities":{"portMappings":true},%s}`, "1.1.0"
		a.ns = test.NewBareNetNS(t)
	} else {
		a.ns = test.NewNetNS(t)
		a.joinHost(t)
	}
	paths := fmt.Sprintf(`"pinDir":%q,"stateDir":%q,"cgroupRoot":%q`, n.paths.PinDir, n.paths.StateDir, n.paths.CgroupRoot)
	text := fmt.Sprintf(`{"cniVersion":%q,"name":%q,"plugins":[`+plugins+`]}`, version, name, paths)
	var err error
	if a.list, err = libcni.ConfListFromBytes([]byte(text)); err != nil {
		t.Fatal(err)
	}
	mesh := fmt.Sprintf(`{"ProxyUserID":"%d","ProxyInboundPort":%d,"ProxyOutboundPort":%d}`, proxyUID, a.inbound, outboundPort)
	a.rt = &libcni.RuntimeConf{
		ContainerID: a.id, NetNS: a.ns.Path, IfName: "eth0",
		Args: [][2]string{
			{"IgnoreUnknown", "true"}, {"NOMAD_ALLOC_ID", a.id}, {"NOMAD_JOB_ID", fmt.Sprintf("job-%d", i)}, {"NOMAD_GROUP_NAME", "g"},
			{"CONSUL_IPTABLES_CONFIG", mesh},
		},
		CapabilityArgs: map[string]any{"portMappings": []any{map[string]any{"hostPort": a.inbound, "containerPort": a.inbound, "protocol": "tcp"}}},
	}
	a.cni = libcni.NewCNIConfigWithCacheDir([]string{filepath.Join(n.dir, "bin"), test.CNIPath(t)}, n.cacheDir(), nil)
	return a
}

// madeLink begins the names of interfaces that the test has made, not the plugin.
const madeLink = "made"

// joinHost is what the plugins before ours do.
func (a *alloc) joinHost(t *testing.T) {
	t.Helper()
	low, high := byte(a.number), byte(a.number>>8)
	gate, gate6 := netip.AddrFrom4([4]byte{10, 64 + high, low, 1}), netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x88, 6: high, 7: low, 15: 1})
	a.addr, a.addr6 = gate.Next(), gate6.Next()
	test.Veth(t,
		test.VethEnd{NetNS: a.host, Name: fmt.Sprintf("%s%d", madeLink, a.number), Addrs: []netip.Prefix{netip.PrefixFrom(gate, 24), netip.PrefixFrom(gate6, 64)}},
		test.VethEnd{NetNS: a.ns, Addrs: []netip.Prefix{netip.PrefixFrom(a.addr, 24), netip.PrefixFrom(a.addr6, 64)}, DefaultRoute: true})
	result := fmt.Sprintf(`{"cniVersion":"0.4.0","interfaces":[{"name":"eth0","sandbox":%q}],"ips":[`+
		`{"version":"4","interface":0,"address":"%s/24"},{"version":"6","interface":0,"address":"%s/64"}]}`, a.ns.Path, a.addr, a.addr6)
	if err := os.WriteFile(a.ns.Path+".result", []byte(result), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(a.ns.Path + ".result") })
}

// call has libcni call the plugins on the host, as Nomad does; they are killed at the
// end of the limit.
func (a *alloc) call(limit time.Duration, do func(ctx context.Context) error) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	a.host.Do(func() { err = do(ctx) })
	return err
}

// add calls ADD; an allocation of the plugin's own network learns its address.
func (a *alloc) add(limit time.Duration) error {
	return a.call(limit, func(ctx context.Context) error {
		result, err := a.cni.AddNetworkList(ctx, a.list, a.rt)
		if err != nil {
			return err
		}
		var got struct {
			IPs []struct{ Address netip.Prefix }
		}
		data, err := json.Marshal(result)
		if err == nil {
			err = json.Unmarshal(data, &got)
		}
		if err != nil || len(got.IPs) == 0 {
			return fmt.Errorf("read result %s: %w", data, err)
		}
		a.addr = got.IPs[0].Address.Addr()
		return nil
	})
}

func (a *alloc) del(limit time.Duration) error {
	return a.call(limit, func(ctx context.Context) error { return a.cni.DelNetworkList(ctx, a.list, a.rt) })
}

func (a *alloc) check(limit time.Duration) error {
	return a.call(limit, func(ctx context.Context) error { return a.cni.CheckNetworkList(ctx, a.list, a.rt) })
}

// collect calls GC of the plugin's own network: what is not named goes.
func (a *alloc) collect(alive []*alloc) error {
	args := &libcni.GCArgs{}
	for _, other := range alive {
		if other.own {
			args.ValidAttachments = append(args.ValidAttachments, gcAttachment(other))
		}
	}
	return a.call(pluginLimit, func(ctx context.Context) error { return a.cni.GCNetworkList(ctx, a.list, args) })
}

func (a *alloc) spec(uid uint32) test.Spec {
	return test.Spec{NetNS: a.ns, Cgroup: a.cgroup, UID: uid, GID: uid}
}

// start runs the allocation's proxy, with the listener of its upstream, and a task.
func (a *alloc) start(t *testing.T) {
	t.Helper()
	proxy := a.cgroup.Child(t, fmt.Sprintf("proxy-%d", a.number))
	spec := a.spec(proxyUID)
	spec.Cgroup = proxy
	a.out = test.EchoProcess(t, spec, "tcp4", fmt.Sprintf("127.0.0.1:%d", outboundPort))
	a.in = test.EchoProcess(t, spec, "tcp4", fmt.Sprintf("0.0.0.0:%d", a.inbound))
	a.upstream = test.EchoProcess(t, spec, "tcp4", fmt.Sprintf("127.0.0.1:%d", upstreamPort))
	task := a.spec(taskUID)
	task.Cgroup = a.cgroup.Child(t, fmt.Sprintf("task-%d", a.number))
	a.task = test.NewClient(t, task)
}

// register tells Consul of the allocation's service and sidecar, as Nomad does.
func (a *alloc) register(upstream string) {
	name := fmt.Sprintf("service-%d", a.number)
	id := fmt.Sprintf("_nomad-task-%s-group-g-%s-8080", a.id, name)
	a.consul.Register(object{
		"Name": name, "ID": id, "Address": a.addr.String(), "Port": 8080,
		"Connect": object{"SidecarService": object{
			"Port": a.inbound, "Address": a.addr.String(), "Checks": []object{{"Name": "alias of " + name, "AliasService": id}},
			"Proxy": object{"Mode": "transparent", "Upstreams": []object{{"DestinationName": upstream, "LocalBindPort": upstreamPort}}},
		}},
	})
}

// object is JSON of Consul's.
type object = map[string]any

func gcAttachment(a *alloc) types.GCAttachment {
	return types.GCAttachment{ContainerID: a.id, IfName: "eth0"}
}
