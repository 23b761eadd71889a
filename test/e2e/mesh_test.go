// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/envoy"
)

// ways are the connections that both proxies saw, by the address from which
// each was passed on: so a task's connection is followed from end to end.
type ways struct {
	out, in map[netip.AddrPort][]envoy.Connection
}

func newWays(out, in []envoy.Connection) ways {
	w := ways{out: map[netip.AddrPort][]envoy.Connection{}, in: map[netip.AddrPort][]envoy.Connection{}}
	for _, line := range out {
		w.out[line.From] = append(w.out[line.From], line)
	}
	for _, line := range in {
		w.in[line.From] = append(w.in[line.From], line)
	}
	return w
}

// have reports whether the connection that the service answered came through
// api's proxy as one to the target, and through web's proxy as one of this
// task to the same target. A port may have served twice.
func (w ways) have(e exchange) bool {
	for _, in := range w.in[e.Reply.Peer] {
		for _, out := range w.out[unmapped(in.Remote)] {
			if in.Listener == "inbound" && unmapped(in.Local) == e.Target &&
				out.Listener == "outbound" && out.Local == e.Target && out.Remote == e.Local {
				return true
			}
		}
	}
	return false
}

// mesh is two allocations on one network, each with its proxy; a task in web
// that dials, a service in api, and a namespace that is not ours.
type mesh struct {
	datapath *redirect.Datapath
	web, api *allocation
	outsider *test.NetNS
	client   *test.Process
	service  *test.ServerProcess
}

// allocation is a namespace under Weir with a real Envoy in a cgroup of its
// own.
type allocation struct {
	key   workload.AttachmentID
	ns    *test.NetNS
	spec  envoy.Spec
	proxy *envoy.Proxy
	seen  int // lines of the access log that saw has returned
}

const (
	proxyUID = 101
	taskUID  = 1000
	patience = 30 * time.Second
)

func newMesh(t *testing.T) *mesh {
	t.Helper()
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	m := &mesh{
		datapath: redirect.New(store.Paths{PinDir: filepath.Join(test.BPFFS(t), "weir"), StateDir: t.TempDir()}),
		outsider: test.NewNetNS(t),
	}
	t.Cleanup(func() {
		if _, err := m.datapath.Unload(); err != nil {
			t.Errorf("unload: %v", err)
		}
	})
	webNS, apiNS := test.NewNetNS(t), test.NewNetNS(t)
	test.Veth(t,
		test.VethEnd{NetNS: webNS, Addrs: prefixes("10.77.0.11/24", "fd77::11/64")},
		test.VethEnd{NetNS: apiNS, Addrs: prefixes("10.77.0.12/24", "10.77.0.13/24", "10.77.0.14/24", "fd77::12/64")})
	test.Veth(t,
		test.VethEnd{NetNS: m.outsider, Addrs: prefixes("10.78.0.1/24"), DefaultRoute: true},
		test.VethEnd{NetNS: apiNS, Name: "eth1", Addrs: prefixes("10.78.0.2/24")})
	m.web = m.newAllocation(t, "web", webNS, "10.77.0.11", "fd77::11")
	m.api = m.newAllocation(t, "api", apiNS, "10.77.0.12", "10.77.0.13", "10.77.0.14", "fd77::12")
	m.client = test.Helper(t, test.Spec{NetNS: webNS, Cgroup: test.NewCgroup(t), UID: taskUID, GID: taskUID}, dialFunc)
	m.service = test.EchoProcess(t, test.Spec{NetNS: apiNS, Cgroup: test.NewCgroup(t), UID: taskUID, GID: taskUID}, "tcp4", "0.0.0.0:8080")
	return m
}

func (m *mesh) newAllocation(t *testing.T, group string, ns *test.NetNS, addresses ...string) *allocation {
	t.Helper()
	a := &allocation{key: workload.AttachmentID{ContainerID: group, IfName: "eth0"}, ns: ns}
	request := workload.Request{
		Network: "nomad", Job: workload.Job{ID: "e2e", Group: group}, Mode: workload.ModeTransparent,
		ProxyUID: proxyUID, InboundPort: 20000, OutboundPort: 15001,
	}
	for _, address := range addresses {
		request.Addresses = append(request.Addresses, netip.MustParseAddr(address))
	}
	if err := m.datapath.Add(redirect.Attachment{Key: a.key, NetNS: ns.Path, Request: request}); err != nil {
		t.Fatalf("add %s: %v", group, err)
	}
	binary, err := envoy.Find()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil { // for the proxy's UID
		t.Fatal(err)
	}
	a.spec = envoy.Spec{
		Binary: binary,
		Config: envoy.Config{
			Outbound: netip.MustParseAddrPort("127.0.0.1:15001"),
			Inbound:  netip.MustParseAddrPort("[::]:20000"),
			Service:  netip.MustParseAddrPort("127.0.0.1:8080"),
			Admin:    netip.MustParseAddrPort("127.0.0.2:19000"),
		},
		NetNS: ns.Path, Cgroup: test.NewCgroup(t).Path, UID: proxyUID, Dir: dir,
	}
	a.start(t)
	t.Cleanup(func() { a.stop(t) })
	return a
}

func (a *allocation) start(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var err error
	if a.proxy, err = envoy.Start(ctx, a.spec); err != nil {
		t.Fatal(err)
	}
}

func (a *allocation) stop(t *testing.T) {
	t.Helper()
	if err := a.proxy.Stop(); err != nil {
		t.Error(err)
	}
}

// saw returns the next connections that the allocation's proxy has logged: as
// many as asked for, and not one more.
func (a *allocation) saw(t *testing.T, count int) []envoy.Connection {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	lines, err := a.proxy.Await(ctx, a.seen, count)
	if err != nil {
		t.Fatal(err)
	}
	if len(lines) != count {
		t.Fatalf("the proxy of %s saw %d connections, want %d: %+v", a.key, len(lines), count, lines)
	}
	a.seen += count
	return lines
}

func (m *mesh) dial(request dialRequest) (list []exchange, err error) {
	err = m.client.Call(request, &list)
	return list, err
}

// counts are verdicts, by allocation and name.
type counts map[string]map[string]uint64

func (m *mesh) counts(t *testing.T) counts {
	t.Helper()
	list, err := m.datapath.Verdicts()
	if err != nil {
		t.Fatalf("read verdicts: %v", err)
	}
	result := counts{}
	for _, verdicts := range list {
		result[verdicts.Key.ContainerID] = verdicts.Counts
	}
	return result
}

// wantRise holds which verdicts rose since before against all that should
// have. Inbound alone may be a few more: a packet that comes when its
// connection is gone already is looked up, and counted, like a new one.
func (m *mesh) wantRise(t *testing.T, before, want counts) {
	t.Helper()
	rose := counts{}
	for group, verdicts := range m.counts(t) {
		rose[group] = map[string]uint64{}
		for name, count := range verdicts {
			if count > before[group][name] {
				rose[group][name] = count - before[group][name]
			}
		}
		inbound := bpfmap.Inbound.String()
		if expected := want[group][inbound]; expected > 0 && rose[group][inbound] > expected {
			rose[group][inbound] -= min(rose[group][inbound]-expected, 1+expected/100)
		}
	}
	if diff := cmp.Diff(want, rose); diff != "" {
		t.Errorf("verdicts that rose (-want +got):\n%s", diff)
	}
}

func prefixes(list ...string) []netip.Prefix {
	var parsed []netip.Prefix
	for _, text := range list {
		parsed = append(parsed, netip.MustParsePrefix(text))
	}
	return parsed
}

// unmapped shows an IPv4 address as one, also where a dual-stack listener has
// logged it in its mapped form.
func unmapped(address netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(address.Addr().Unmap(), address.Port())
}
