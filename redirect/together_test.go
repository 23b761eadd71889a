// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/program/filter"
	"github.com/weirmesh/weir/redirect/reconcile"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// plainWorkloads puts namespaces under Weir that have lo alone, which is enough for
// rows.
func plainWorkloads(t testing.TB, d *Datapath, count int) (list []Attachment) {
	t.Helper()
	known, err := d.Records()
	if err != nil {
		t.Fatal(err)
	}
	for i := len(known); i < len(known)+count; i++ {
		a := Attachment{
			Key: workload.AttachmentID{ContainerID: fmt.Sprintf("plain-%d", i), IfName: "eth0"}, NetNS: test.NewNetNS(t).Path,
			Request: workload.Request{
				Network: "nomad", Mode: workload.ModeTransparent, ProxyUID: proxyUID, InboundPort: inboundPort, OutboundPort: outboundPort,
			},
		}
		if err := d.Add(a); err != nil {
			t.Fatal(err)
		}
		list = append(list, a)
	}
	return list
}

// inForce are the inbound ports of the workloads' rows, as the kernel has them.
func inForce(t *testing.T, d *Datapath, list []Attachment) (ports []uint16) {
	t.Helper()
	tables, err := bpfmap.OpenTables(d.Paths().Maps())
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	for _, a := range list {
		cookie, err := host.Cookie(a.NetNS)
		if err != nil {
			t.Fatal(err)
		}
		generation, err := tables.Generation(cookie)
		if err != nil {
			t.Fatal(err)
		}
		var config bpfmap.BpfConfig
		if _, err := tables.Get("configs", bpfmap.BpfConfigKey{Cookie: cookie, Generation: generation}, &config); err != nil {
			t.Fatal(err)
		}
		ports = append(ports, config.InboundPort)
	}
	return ports
}

// Changes of many workloads wait for the kernel's readers once a group, however many
// there are, and what cannot be changed is nobody else's error.
func TestChangesWaitInCommon(t *testing.T) {
	d := newDatapath(t)
	list := plainWorkloads(t, d, reconcile.MaxChanges+8)
	rows, waits := rowCounts(t, d), 0
	d.Wait = func() { waits++; bpfmap.WaitForReaders() }
	change := func(port uint16) (changes []reconcile.MeshChange) {
		for _, a := range list {
			changes = append(changes, reconcile.MeshChange{Key: a.Key, MeshConfig: workload.MeshConfig{InboundPort: port}})
		}
		return changes
	}
	if err := errors.Join(d.SetMeshConfigs(change(20001))...); err != nil {
		t.Fatal(err)
	}
	if waits != 2 {
		t.Errorf("%d changes waited %d times, want once for each %d", len(list), waits, reconcile.MaxChanges)
	}
	want := make([]uint16, len(list))
	for i := range want {
		want[i] = 20001
	}
	if diff := cmp.Diff(want, inForce(t, d, list)); diff != "" {
		t.Errorf("inbound ports in force (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(rows, rowCounts(t, d)); diff != "" {
		t.Errorf("rows after the change (-want +got):\n%s", diff)
	}

	waits = 0
	if err := errors.Join(d.SetMeshConfigs(change(20001))...); err != nil || waits != 0 {
		t.Errorf("the same again waited %d times, error %v; want no wait", waits, err)
	}

	changes := change(20002)[:6]
	changes[2].MeshConfig.Upstreams = []workload.Upstream{{Name: "db", Addresses: []netip.Addr{{}}}}
	changes[3].Key.ContainerID = "nobody"
	errs := d.SetMeshConfigs(changes)
	for i, err := range errs {
		bad := i == 2 || i == 3
		if (err != nil) != bad || bad && !strings.Contains(err.Error(), changes[i].Key.String()) {
			t.Errorf("change %d: %v", i, err)
		}
	}
	if !errors.Is(errs[3], store.ErrUnknown) {
		t.Errorf("change of a workload that is not there: %v", errs[3])
	}
	want[0], want[1], want[4], want[5] = 20002, 20002, 20002, 20002
	if diff := cmp.Diff(want, inForce(t, d, list)); diff != "" || waits != 1 {
		t.Errorf("waits %d, want 1; inbound ports in force (-want +got):\n%s", waits, diff)
	}
}

// A process that dies within a change of several leaves none that the next call
// does not finish.
func TestKilledChanges(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.startProxy()
	a.add(full)
	other := n.newAlloc()
	other.startProxy()
	other.add(full)
	next, settings := 0, []workload.MeshConfig{{ExcludeInboundPorts: []uint16{9001}}, {ExcludeInboundPorts: []uint16{9002}}}
	changes := func() []reconcile.MeshChange {
		return []reconcile.MeshChange{{Key: a.key, MeshConfig: settings[next%2]}, {Key: other.key, MeshConfig: settings[next%2]}}
	}
	if err := errors.Join(n.SetMeshConfigs(changes())...); err != nil {
		t.Fatal(err)
	}
	rows := rowCounts(t, n.Datapath)
	configure := operation{Do: "configure", Attachment: Attachment{Key: other.key}, Changes: changes()}
	newKiller(n).times(t, configure, test.Scale(60), func() {
		if err := errors.Join(n.SetMeshConfigs([]reconcile.MeshChange{{Key: a.key, MeshConfig: workload.MeshConfig{}}, {Key: other.key, MeshConfig: workload.MeshConfig{}}})...); err != nil {
			t.Fatal(err)
		}
	}, func(int) {
		next++
		a.works()
		other.works()
		if err := errors.Join(n.SetMeshConfigs(changes())...); err != nil {
			t.Fatal(err)
		}
		for _, each := range []*alloc{a, other} {
			r, err := n.Paths().ReadRecord(each.key)
			if err != nil || r.State != store.Complete {
				t.Errorf("record of %s: %+v, %v", each.key, r, err)
			}
		}
		now := rowCounts(t, n.Datapath)
		for _, table := range []string{"origins", "indexes"} { // of works
			delete(now, table)
		}
		if diff := cmp.Diff(rows, now); diff != "" {
			t.Errorf("rows, compared with those of before (-want +got):\n%s", diff)
		}
	})
}

// A namespace that has no filter is not made to wait for packets under way, which a
// transaction that finds nothing does.
func TestNoFilterNoWait(t *testing.T) {
	test.Need(t, test.Root)
	ns, err := host.OpenNamespace(test.NewNetNS(t).Path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	least := func(action func() error) (least time.Duration) {
		least = time.Hour
		for range 10 {
			start := time.Now()
			if err := action(); err != nil {
				t.Fatal(err)
			}
			least = min(least, time.Since(start))
		}
		return least
	}
	failed := least(func() error {
		return ns.Do(func() error {
			conn, err := nftables.New()
			if err != nil {
				return err
			}
			conn.DelTable(&nftables.Table{Name: filter.FilterTable, Family: nftables.TableFamilyINet})
			if conn.Flush() == nil {
				t.Error("a table was deleted that is not there")
			}
			return nil
		})
	})
	removed := least(func() error {
		there, err := filter.NewSetter().Remove(ns)
		if there {
			t.Error("a table was removed that is not there")
		}
		return err
	})
	if removed > failed/2 {
		t.Errorf("removing no filter takes %v, a transaction that fails %v", removed, failed)
	}
}

// A check of several workloads repairs what is theirs, says whose it was, and leaves to
// Repair what all of them share.
func TestCheckSome(t *testing.T) {
	n := newNode(t)
	a, other := n.newAlloc(), n.newAlloc()
	for _, each := range []*alloc{a, other} {
		each.startProxy()
		each.add(full)
	}
	detachPinned(t, n.Paths().Lookup(other.Cookie()))
	detachPinned(t, n.Paths().Link("weir_connect4"))
	nobody := workload.AttachmentID{ContainerID: "nobody", IfName: "eth0"}
	checked := n.CheckSome([]workload.AttachmentID{a.key, other.key, nobody})
	if checked[0].Err != nil || len(checked[0].Repaired) > 0 || checked[0].Key != a.key {
		t.Errorf("a workload without damage: %+v", checked[0])
	}
	if checked[1].Err != nil || !slices.Equal(checked[1].Repaired, []program.Repair{{Kind: program.LookupAttached}}) || checked[1].Key != other.key {
		t.Errorf("a workload without its program: %+v, want that it is attached", checked[1])
	}
	if !errors.Is(checked[2].Err, store.ErrUnknown) {
		t.Errorf("a workload that is not there: %+v", checked[2])
	}
	if repairs, err := n.Repair(); err != nil || !slices.Equal(repairs, []program.Repair{{Kind: program.Reattached, Object: "weir_connect4"}}) {
		t.Errorf("repair: %v, %v; want what the check left", repairs, err)
	}
	a.works()
	other.works()
}

// What a link is attached to is read without the library, as the library says it.
func TestLookupAt(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	pin := n.Paths().Lookup(a.Cookie())
	pinned, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pinned.Close()
	if got, want := program.LookupAt(pin), program.LookupInode(pinned); got != want || got == 0 {
		t.Errorf("the program is attached to namespace %d, want %d", got, want)
	}
	for what, other := range map[string]string{"a link of a cgroup": n.Paths().Link("weir_connect4"), "a map": n.Paths().Maps() + "/workloads", "nothing": pin + "0"} {
		if got := program.LookupAt(other); got != 0 {
			t.Errorf("%s is attached to namespace %d", what, got)
		}
	}
	if err := pinned.Detach(); err != nil {
		t.Fatal(err)
	}
	if got := program.LookupAt(pin); got != 0 || n.LookupAttached(a.Cookie()) {
		t.Errorf("a detached program is attached to namespace %d", got)
	}
}
