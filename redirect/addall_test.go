// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// plainAttachments ask for namespaces that have lo alone.
func plainAttachments(t *testing.T, name string, count int) (list []Attachment) {
	t.Helper()
	for i := range count {
		list = append(list, Attachment{
			Key: workload.AttachmentID{ContainerID: fmt.Sprint(name, "-", i), IfName: "eth0"}, NetNS: test.NewNetNS(t).Path,
			Request:    workload.Request{Network: "nomad", Mode: workload.ModeDirect, ProxyUID: proxyUID},
			MeshConfig: &workload.MeshConfig{InboundPort: uint16(21000 + i), Guard: workload.GuardEnforce},
		})
	}
	return list
}

// Many namespaces come under Weir in one turn of the lock, and each as an Add of its own
// would leave it. What is wrong with one is its error alone, and leaves nothing of it.
func TestAddAll(t *testing.T) {
	d := newDatapath(t)
	list := plainAttachments(t, "together", 8)
	list[2].Request.Mode = "no such mode"
	list[3].NetNS += "-gone"
	list[5].NetNS = list[4].NetNS // another key of the same namespace: the later one has it
	errs := d.AddAll(list)
	for i, err := range errs {
		bad := i == 2 || i == 3
		if (err != nil) != bad || bad && !strings.Contains(err.Error(), list[i].Key.String()) {
			t.Errorf("addition %d: %v", i, err)
		}
	}
	if !errors.Is(errs[3], host.ErrNetNSGone) {
		t.Errorf("addition of a namespace that is not there: %v", errs[3])
	}
	want := []uint16{21000, 21001, 21005, 21006, 21007}
	there := []Attachment{list[0], list[1], list[5], list[6], list[7]}
	if diff := cmp.Diff(want, inForce(t, d, there)); diff != "" {
		t.Errorf("inbound ports in force (-want +got):\n%s", diff)
	}
	records, err := d.Paths().ReadRecords()
	if err != nil || len(records) != len(there) {
		t.Errorf("%d records, %v; want %d", len(records), err, len(there))
	}
	for _, r := range records {
		if r.State != store.Complete || !d.LookupAttached(r.Cookie) {
			t.Errorf("%s: record %+v, program attached: %t", r.Key, r, d.LookupAttached(r.Cookie))
		}
	}
	rows := rowCounts(t, d)
	if err := errors.Join(d.AddAll(there)...); err != nil {
		t.Errorf("the same again: %v", err)
	}
	if diff := cmp.Diff(rows, rowCounts(t, d)); diff != "" {
		t.Errorf("rows after the same again (-want +got):\n%s", diff)
	}
	for _, a := range there {
		if err := d.Remove(a.Key); err != nil {
			t.Error(err)
		}
	}
	for table, count := range rowCounts(t, d) {
		if count > 0 && table != "control" {
			t.Errorf("%d rows are left in %s", count, table)
		}
	}
}

// A process that dies while it adds several leaves nothing that the next one does not
// finish, or undo.
func TestKilledAddAll(t *testing.T) {
	n := newNode(t)
	list := plainAttachments(t, "killed", 6)
	add := func() {
		if err := errors.Join(n.AddAll(list)...); err != nil {
			t.Fatal(err)
		}
	}
	remove := func() {
		for _, a := range list {
			if err := n.Remove(a.Key); err != nil {
				t.Fatal(err)
			}
		}
	}
	empty := rowCounts(t, n.Datapath)
	add()
	rows := rowCounts(t, n.Datapath)
	remove()
	killed := operation{Do: "add", Attachment: list[0], Others: list[1:]}
	newKiller(n).times(t, killed, test.Scale(60), func() {}, func(i int) {
		if i%2 == 0 {
			add()
			if diff := cmp.Diff(rows, rowCounts(t, n.Datapath)); diff != "" {
				t.Errorf("rows once all are added (-want +got):\n%s", diff)
			}
			for _, a := range list {
				r, err := n.Paths().ReadRecord(a.Key)
				if err != nil || r.State != store.Complete || !n.LookupAttached(r.Cookie) {
					t.Errorf("%s: record %+v, %v", a.Key, r, err)
				}
			}
		}
		remove()
		if diff := cmp.Diff(empty, rowCounts(t, n.Datapath)); diff != "" {
			t.Errorf("rows once all are removed (-want +got):\n%s", diff)
		}
	})
}
