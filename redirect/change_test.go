// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// traffic dials in processes of its own, as fast as these can, until it is
// stopped, and fails the test at the first connection that nobody on its list
// answered.
type traffic struct {
	t     *testing.T
	stop  atomic.Bool
	done  sync.WaitGroup
	mutex sync.Mutex
	seen  map[string]map[string]int // who answered, by what was dialled
}

func newTraffic(t *testing.T) *traffic {
	f := &traffic{t: t, seen: make(map[string]map[string]int)}
	t.Cleanup(f.end)
	return f
}

func (f *traffic) dial(spec test.Spec, addr string, allowed ...*test.ServerProcess) {
	client := test.NewClient(f.t, spec)
	names := make(map[string]int)
	f.mutex.Lock()
	f.seen[addr] = names
	f.mutex.Unlock()
	f.done.Go(func() {
		for !f.stop.Load() && !f.t.Failed() {
			answer, err := client.Ask("tcp", addr)
			if err != nil || !slices.ContainsFunc(allowed, func(s *test.ServerProcess) bool { return s.Name == answer.Server }) {
				f.t.Errorf("dial %s: %+v, %v; neither the old set nor the new one", addr, answer, err)
				return
			}
			f.mutex.Lock()
			names[answer.Server]++
			f.mutex.Unlock()
		}
	})
}

func (f *traffic) end() {
	f.stop.Store(true)
	f.done.Wait()
}

// sawBoth ends the traffic and fails the test unless each dialler saw as many
// servers as it might.
func (f *traffic) sawBoth(want map[string]int) {
	f.t.Helper()
	f.end()
	saw := make(map[string]int)
	for addr, names := range f.seen {
		saw[addr] = len(names)
		f.t.Logf("%s was answered by %v", addr, names)
	}
	if diff := cmp.Diff(want, saw); diff != "" {
		f.t.Errorf("servers that answered a dialler (-want +got):\n%s", diff)
	}
}

// The two sets of TestOverlayChangesAtOnce differ in several rows. A mixture of
// the two sends port 8080 to the inbound listener of the first, or 8081 to that
// of the second: neither set does.
func meshConfigs() [2]workload.MeshConfig {
	upstream := func(listener string) []workload.Upstream {
		return []workload.Upstream{{Name: "db", Addresses: []netip.Addr{netip.MustParseAddr("240.0.0.1")}, Listener: netip.MustParseAddrPort(listener)}}
	}
	return [2]workload.MeshConfig{
		{InboundPort: 20000, ExcludeInboundPorts: []uint16{8080}, Upstreams: upstream("127.0.0.1:9001")},
		{InboundPort: 20001, ExcludeInboundPorts: []uint16{8081}, Upstreams: upstream("127.0.0.1:9002")},
	}
}

func TestOverlayChangesAtOnce(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *workload.Request) { r.InboundPort = 0 })
	a.startProxy()
	proxy := func(addr string) *test.ServerProcess { return a.serve(proxyUID, a.proxyCg, "tcp4", addr) }
	inbound := [2]*test.ServerProcess{a.inbound, proxy("0.0.0.0:20001")}
	upstream := [2]*test.ServerProcess{proxy("127.0.0.1:9001"), proxy("127.0.0.1:9002")}
	app := [2]*test.ServerProcess{
		a.serve(taskUID, a.taskCg, "tcp4", "0.0.0.0:8080"),
		a.serve(taskUID, a.taskCg, "tcp4", "0.0.0.0:8081"),
	}
	sets := meshConfigs()
	change := func(i int) {
		t.Helper()
		if err := n.SetMeshConfig(a.key, sets[i%2]); err != nil {
			t.Fatal(err)
		}
	}
	change(0)
	rows := rowCounts(t, n.Datapath)

	outside, task := test.Spec{NetNS: n.remote}, test.Spec{NetNS: a.NetNS, Cgroup: a.taskCg, UID: taskUID, GID: taskUID}
	load := newTraffic(t)
	load.dial(outside, addrPort(a.v4, 8080), app[0], inbound[1])
	load.dial(outside, addrPort(a.v4, 8081), inbound[0], app[1])
	load.dial(task, "240.0.0.1:80", upstream[0], upstream[1])
	load.dial(task, "240.0.0.2:80", a.outbound)
	for i := range test.Scale(200) {
		change(i)
		// Whoever dials after the change has the new set.
		if answer, err := test.Ask(n.remote, "tcp4", addrPort(a.v4, 9999)); err != nil || answer.Server != inbound[i%2].Name {
			t.Fatalf("dial after change %d: %+v, %v; want %s", i, answer, err, inbound[i%2].Name)
		}
	}
	change(0)
	load.sawBoth(map[string]int{addrPort(a.v4, 8080): 2, addrPort(a.v4, 8081): 2, "240.0.0.1:80": 2, "240.0.0.2:80": 1})
	now := rowCounts(t, n.Datapath)
	delete(now, "origins")
	delete(now, "indexes")
	if diff := cmp.Diff(rows, now); diff != "" {
		t.Errorf("rows after the changes (-want +got):\n%s", diff)
	}
	allowed := []bpfmap.Verdict{bpfmap.Redirected, bpfmap.ToUpstream, bpfmap.Inbound, bpfmap.InboundExcluded, bpfmap.Listener, bpfmap.RefusedInboundUnknown}
	for verdict, count := range a.counts() {
		if !slices.Contains(allowed, verdict) {
			t.Errorf("verdict %s was counted %d times", verdict, count)
		}
	}
	healthy(t, n.Datapath)
}

// The request may change too. Port 7001 of the remote is excluded in both sets,
// by its port in one and by its CIDR in the other.
func TestRequestChangesAtOnce(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	sets := [2]func(*workload.Request){
		func(r *workload.Request) { r.ExcludeOutboundPorts = []uint16{7001} },
		func(r *workload.Request) {
			r.ExcludeOutboundCIDRs = []netip.Prefix{netip.PrefixFrom(remote4(1), 32), netip.PrefixFrom(remote6(1), 128)}
		},
	}
	a.add(sets[0])
	a.startProxy()
	rows := rowCounts(t, n.Datapath)
	far := test.Spec{NetNS: n.remote}
	first, second := test.EchoProcess(t, far, "tcp", "[::]:7001"), test.EchoProcess(t, far, "tcp", "[::]:7002")

	task := test.Spec{NetNS: a.NetNS, Cgroup: a.taskCg, UID: taskUID, GID: taskUID}
	load := newTraffic(t)
	load.dial(task, addrPort(remote4(1), 7001), first)
	load.dial(task, addrPort(remote6(1), 7001), first)
	load.dial(task, addrPort(remote4(1), 7002), a.outbound, second)
	for i := range test.Scale(200) {
		a.add(sets[i%2])
	}
	a.add(sets[0])
	load.sawBoth(map[string]int{addrPort(remote4(1), 7001): 1, addrPort(remote6(1), 7001): 1, addrPort(remote4(1), 7002): 2})
	now := rowCounts(t, n.Datapath)
	maps.DeleteFunc(now, func(name string, _ int) bool { return name == "origins" || name == "indexes" })
	if diff := cmp.Diff(rows, now); diff != "" {
		t.Errorf("rows after the changes (-want +got):\n%s", diff)
	}
	for verdict, count := range a.counts() {
		if !slices.Contains([]bpfmap.Verdict{bpfmap.Redirected, bpfmap.PortExcluded, bpfmap.CIDRExcluded, bpfmap.Listener}, verdict) {
			t.Errorf("verdict %s was counted %d times", verdict, count)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// A change that cannot be made leaves the set that is in force, alone.
func TestFailedChangeKeepsTheOldSet(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(full)
	a.startProxy()
	rows, generation := rowCounts(t, n.Datapath), generationOf(t, n.Datapath, a.NetNS)
	many := workload.Upstream{Name: "many", Listener: netip.MustParseAddrPort("127.0.0.1:9191")}
	for i := range bpfmap.RowShare - 8 {
		many.Addresses = append(many.Addresses, netip.AddrFrom4([4]byte{240, 1, byte(i >> 8), byte(i)}))
	}
	// The table is filled by others.
	tables, err := bpfmap.OpenTables(n.Paths().Maps())
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	filler := workload.Workload{OutboundPort: 1}
	addresses, err := tables.Table("addresses")
	if err != nil {
		t.Fatal(err)
	}
	for i := range addresses.MaxEntries() - bpfmap.RowShare/2 {
		filler.Addresses = append(filler.Addresses, netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)}))
	}
	if err := tables.WriteRows(1<<60, filler, false); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if err := n.SetMeshConfig(a.key, workload.MeshConfig{Upstreams: []workload.Upstream{many}}); err == nil {
			t.Fatal("the change succeeded")
		} else if i == 0 {
			t.Log(err)
		}
	}
	if err := n.SetMeshConfig(a.key, workload.MeshConfig{InboundPort: outboundPort}); err == nil {
		t.Error("a mesh configuration that gives one port to both listeners was accepted")
	}
	if err := tables.DeleteWorkload(1<<60, &filler); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(rows, rowCounts(t, n.Datapath)); diff != "" {
		t.Errorf("rows after failed changes (-want +got):\n%s", diff)
	}
	if now := generationOf(t, n.Datapath, a.NetNS); now != generation {
		t.Errorf("generation = %d after failed changes, was %d", now, generation)
	}
	a.works()
	if err := n.SetMeshConfig(a.key, workload.MeshConfig{}); err != nil {
		t.Errorf("change back: %v", err)
	}
	if err := n.SetMeshConfig(workload.AttachmentID{ContainerID: "nobody", IfName: "eth0"}, workload.MeshConfig{}); err == nil || fmt.Sprint(err) == "" {
		t.Error("a change of an unknown workload succeeded")
	}
	healthy(t, n.Datapath)
}
