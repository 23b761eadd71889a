// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

func TestMain(m *testing.M) { test.Main(m, helpers()) }

// The users of the tests: the proxy, and a task that is not it.
const (
	proxyUID = 101
	taskUID  = 1000
)

// The ports of the tests' proxies, and of a second one in the same allocation.
const (
	outboundPort   = 15001
	inboundPort    = 20000
	secondOutbound = 15002
	secondInbound  = 20001
)

// newDatapath loads an instance of its own, which ends with the test.
func newDatapath(t testing.TB) *Datapath {
	t.Helper()
	d := unloadedDatapath(t)
	if _, err := d.Load(); err != nil {
		t.Fatalf("load: %+v", err)
	}
	return d
}

func unloadedDatapath(t testing.TB) *Datapath {
	t.Helper()
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	d := New(store.Paths{PinDir: filepath.Join(test.BPFFS(t), "weir"), StateDir: filepath.Join(t.TempDir(), "state")})
	t.Cleanup(func() {
		if _, err := d.Unload(); err != nil {
			t.Errorf("unload: %v", err)
		}
	})
	return d
}

// node is a network of namespaces with a Weir of its own: allocations on one
// side, a remote host that all of them reach on the other.
type node struct {
	*Datapath
	t      *testing.T
	remote *test.NetNS
	allocs int
}

// The remote's addresses in the network of the n-th allocation.
func remote4(n int) netip.Addr { return netip.MustParseAddr(fmt.Sprintf("10.9.%d.1", n)) }
func remote6(n int) netip.Addr { return netip.MustParseAddr(fmt.Sprintf("fd09:%d::1", n)) }

func newNode(t *testing.T) *node {
	t.Helper()
	return &node{Datapath: newDatapath(t), t: t, remote: test.NewNetNS(t)}
}

// alloc is a namespace with a veth to the remote, not yet under Weir.
type alloc struct {
	*test.NetNS
	node      *node
	number    int
	v4, v6    netip.Addr
	key       workload.AttachmentID
	proxyCg   *test.Cgroup
	taskCg    *test.Cgroup
	outbound  *test.ServerProcess
	inbound   *test.ServerProcess
	taskCache map[test.Spec]*test.Client
}

func (n *node) newAlloc() *alloc {
	n.t.Helper()
	n.allocs++
	i := n.allocs
	a := &alloc{
		NetNS: test.NewNetNS(n.t), node: n, number: i,
		v4:      netip.MustParseAddr(fmt.Sprintf("10.9.%d.2", i)),
		v6:      netip.MustParseAddr(fmt.Sprintf("fd09:%d::2", i)),
		key:     workload.AttachmentID{ContainerID: fmt.Sprintf("alloc-%d", i), IfName: "eth0"},
		proxyCg: test.NewCgroup(n.t), taskCg: test.NewCgroup(n.t),
		taskCache: make(map[test.Spec]*test.Client),
	}
	test.Veth(n.t,
		test.VethEnd{NetNS: a.NetNS, Addrs: []netip.Prefix{netip.PrefixFrom(a.v4, 24), netip.PrefixFrom(a.v6, 64)}, DefaultRoute: true},
		test.VethEnd{NetNS: n.remote, Name: fmt.Sprintf("veth%d", i), Addrs: []netip.Prefix{netip.PrefixFrom(remote4(i), 24), netip.PrefixFrom(remote6(i), 64)}})
	return a
}

func (a *alloc) request() workload.Request {
	return workload.Request{
		Network: "nomad", Job: workload.Job{ID: "job", Group: "group", AllocID: a.key.ContainerID}, Mode: workload.ModeTransparent,
		ProxyUID: proxyUID, InboundPort: inboundPort, OutboundPort: outboundPort,
		Addresses: []netip.Addr{a.v4, a.v6},
	}
}

// add puts the allocation under Weir; change edits the request before.
func (a *alloc) add(change ...func(*workload.Request)) {
	a.node.t.Helper()
	request := a.request()
	for _, edit := range change {
		edit(&request)
	}
	if err := a.node.Add(Attachment{Key: a.key, NetNS: a.Path, Request: request}); err != nil {
		a.node.t.Fatalf("%+v", err)
	}
}

// startProxy runs the allocation's proxy: two echo servers that answer
// SO_ORIGINAL_DST.
func (a *alloc) startProxy() {
	a.node.t.Helper()
	a.outbound = a.serve(proxyUID, a.proxyCg, "tcp4", fmt.Sprintf("127.0.0.1:%d", outboundPort))
	a.inbound = a.serve(proxyUID, a.proxyCg, "tcp4", fmt.Sprintf("0.0.0.0:%d", inboundPort))
}

func (a *alloc) serve(uid uint32, cgroup *test.Cgroup, network, addr string) *test.ServerProcess {
	a.node.t.Helper()
	return test.EchoProcess(a.node.t, test.Spec{NetNS: a.NetNS, Cgroup: cgroup, UID: uid, GID: uid}, network, addr)
}

// ask dials as a task of the allocation.
func (a *alloc) ask(network, addr string) (test.Answer, error) {
	a.node.t.Helper()
	return a.askAs(taskUID, a.taskCg, network, addr)
}

func (a *alloc) askAs(uid uint32, cgroup *test.Cgroup, network, addr string) (test.Answer, error) {
	a.node.t.Helper()
	spec := test.Spec{NetNS: a.NetNS, Cgroup: cgroup, UID: uid, GID: uid}
	client := a.taskCache[spec]
	if client == nil {
		client = test.NewClient(a.node.t, spec)
		a.taskCache[spec] = client
	}
	return client.Ask(network, addr)
}

// counts returns the allocation's verdict counters.
func (a *alloc) counts() map[bpfmap.Verdict]uint64 {
	a.node.t.Helper()
	list, err := a.node.Verdicts()
	if err != nil {
		a.node.t.Fatal(err)
	}
	counts := make(map[bpfmap.Verdict]uint64)
	for _, w := range list {
		if w.Key != a.key {
			continue
		}
		for _, verdict := range bpfmap.AllVerdicts() {
			if n := w.Counts[verdict.String()]; n > 0 {
				counts[verdict] = n
			}
		}
	}
	return counts
}

// rose runs action and returns which counters it moved, by how much.
func (a *alloc) rose(action func()) map[bpfmap.Verdict]uint64 {
	a.node.t.Helper()
	before := a.counts()
	action()
	moved := a.counts()
	for verdict, n := range before {
		if moved[verdict] -= n; moved[verdict] == 0 {
			delete(moved, verdict)
		}
	}
	return moved
}

func addrPort(addr netip.Addr, port uint16) string { return netip.AddrPortFrom(addr, port).String() }
