// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

func readIfThere(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return string(data)
}

func TestRecordKeepsWhatWasWritten(t *testing.T) {
	paths := store.Paths{StateDir: t.TempDir()}
	boot, err := store.BootID()
	if err != nil {
		t.Fatal(err)
	}
	request := workload.Request{Network: "nomad", Mode: workload.ModeTransparent, ProxyUID: 4_294_967_294, OutboundPort: 15001, Budget: 7,
		Job: workload.Job{Region: "global", Namespace: "default", ID: "job", Group: "group", AllocID: "id"}, Notes: []string{"a note"},
		Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}}
	full(&request)
	want := &store.Record{
		Key: workload.AttachmentID{ContainerID: "id", IfName: "eth0"}, Request: request, MeshConfig: meshConfigs()[0], NetNS: "/run/netns/id",
		Cookie: 1<<63 + 1, BootID: boot, IPv6: true, State: store.Complete,
	}
	want.Applied = want.Desired()
	if err := paths.WriteRecord(want); err != nil {
		t.Fatal(err)
	}
	got, err := paths.ReadRecord(want.Key)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(store.Record{}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("record (-written +read):\n%s", diff)
	}
	if !got.Applied.Equal(got.Desired()) {
		t.Error("the applied workload is not the desired one after a read")
	}
	for range 2 {
		if err := paths.RemoveRecord(want.Key); err != nil {
			t.Error(err)
		}
	}
	if _, err := paths.ReadRecord(want.Key); !errors.Is(err, store.ErrUnknown) {
		t.Errorf("read after the removal: %v, want ErrUnknown", err)
	}
}

// agedRecord turns the allocation's record into one of an earlier boot.
func agedRecord(t *testing.T, d *Datapath, key workload.AttachmentID) {
	t.Helper()
	r, err := d.Paths().ReadRecord(key)
	if err != nil {
		t.Fatal(err)
	}
	r.BootID = "00000000-0000-0000-0000-000000000000"
	if err := d.Paths().WriteRecord(r); err != nil {
		t.Fatal(err)
	}
}

// After a reboot the cookies of the records are somebody else's.
func TestRecordOfAnEarlierBootIsIgnored(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(full)
	a.startProxy()
	agedRecord(t, n.Datapath, a.key)
	if list, err := n.Workloads(); err != nil || len(list) != 0 {
		t.Errorf("workloads = %+v, %v; want none", list, err)
	}
	if _, err := n.Check(a.key, a.Path); !errors.Is(err, store.ErrUnknown) {
		t.Errorf("check: %v, want ErrUnknown", err)
	}
	if _, err := n.GC("nomad", nil); err != nil {
		t.Error(err)
	}
	a.works() // nobody took the namespace's rows away
	a.add(full)
	a.works()
	agedRecord(t, n.Datapath, a.key)
	if err := n.Remove(a.key); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(n.Paths().Record(a.key)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("record of an earlier boot after its DEL: %v, want it gone", err)
	}
}

// One file that nobody can read must not take the node's other workloads along.
func TestRecordThatCannotBeReadHidesNoOther(t *testing.T) {
	n := newNode(t)
	a, b := n.newAlloc(), n.newAlloc()
	a.add()
	a.startProxy()
	broken := workload.AttachmentID{ContainerID: "broken", IfName: "eth0"}
	if err := os.WriteFile(n.Paths().Record(broken), []byte("{\"key\": "), 0o600); err != nil {
		t.Fatal(err)
	}
	status, err := n.Status()
	if err != nil {
		t.Fatalf("status: %v", err)
	}
	named := false
	for _, problem := range status.Problems {
		named = named || strings.Contains(problem.What, n.Paths().Record(broken))
	}
	if status.Workloads != 1 || !named {
		t.Errorf("status = %+v, want one workload and a problem that names the file", status)
	}
	b.add()
	b.startProxy()
	a.works()
	b.works()
	if _, err := n.Check(a.key, a.Path); err != nil {
		t.Errorf("check: %v", err)
	}
	if list, err := n.Verdicts(); err == nil || len(list) != 2 {
		t.Errorf("verdicts of %d workloads, %v; want 2, and an error for the third", len(list), err)
	}
	if err := os.RemoveAll(n.Paths().PinDir); err != nil {
		t.Fatal(err)
	}
	loaded, err := n.Load()
	if err != nil || len(loaded.Problems) != 1 || !strings.Contains(loaded.Problems[0].What, n.Paths().Record(broken)) {
		t.Errorf("load: %+v, %v; want a problem that names the file", loaded, err)
	}
	a.works()
	b.works()
	staleDigest(t, n.Datapath)
	loaded, err = n.Load()
	if err != nil || len(loaded.Problems) != 1 || !strings.Contains(loaded.Problems[0].What, n.Paths().Record(broken)) {
		t.Errorf("upgrade: %+v, %v; want a problem that names the file", loaded, err)
	}
	if status, err := n.Status(); err != nil || !status.Current {
		t.Errorf("status after the upgrade: current %t, %v", status.Current, err)
	}
	for name, call := range map[string]func() error{
		"GC":      func() error { return second(n.GC("nomad", []workload.AttachmentID{a.key, b.key})) },
		"prune":   func() error { return second(n.PruneDead()) },
		"collect": func() error { return second(n.NewIndexReclaimer().Run()) },
	} {
		if err := call(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := n.Remove(broken); err != nil {
		t.Errorf("remove of a workload whose record cannot be read: %v", err)
	}
	healthy(t, n.Datapath)
}

// A record that this version cannot read is no reason to lose it: it is kept
// aside, and the workload gets one that this version can read.
func TestRecordThatCannotBeReadIsMadeAnew(t *testing.T) {
	for name, spoil := range map[string]func(text string) string{
		"cut short":               func(text string) string { return text[:len(text)/2] },
		"empty":                   func(string) string { return "" },
		"a field of another type": func(text string) string { return strings.Replace(text, `"netns": "`, `"netns": {"path": "`, 1) + "}" },
		"of a newer version":      func(text string) string { return strings.Replace(text, `"schema": 1`, `"schema": 2`, 1) },
		"of a newer version, rewritten": func(text string) string {
			return strings.Replace(strings.Replace(text, `"schema": 1`, `"schema": 2`, 1), `"request": {`, `"request": 7, "asked": {`, 1)
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			a := n.newAlloc()
			a.add(full)
			a.startProxy()
			path := n.Paths().Record(a.key)
			spoiled := spoil(readIfThere(t, path))
			if err := os.WriteFile(path, []byte(spoiled), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := n.Check(a.key, a.Path); !errors.Is(err, store.ErrUnreadable) || !strings.Contains(err.Error(), path) {
				t.Errorf("check: %v, want ErrUnreadable that names %s", err, path)
			}
			a.works()
			a.add(full)
			if kept := readIfThere(t, path+store.AsideSuffix); kept != spoiled {
				t.Errorf("set aside: %q, want what was there", kept)
			}
			a.works()
			healthy(t, n.Datapath)
			a.remove()
			nothingLeft(t, n.Datapath)
		})
	}
}

// A record from before there were schemas is one of the first schema.
func TestRecordWithoutASchemaIsRead(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(full)
	path := n.Paths().Record(a.key)
	text := readIfThere(t, path)
	old := strings.Replace(text, "  \"schema\": 1,\n", "", 1)
	if old == text {
		t.Fatalf("no schema in %s", text)
	}
	if err := os.WriteFile(path, []byte(old), 0o600); err != nil {
		t.Fatal(err)
	}
	if repaired, err := n.Check(a.key, a.Path); err != nil || len(repaired) != 0 {
		t.Errorf("check: repaired %q, %v; want nothing", repaired, err)
	}
}

func TestUnreadableStateDirIsAnError(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	file := t.TempDir() + "/file"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d := New(store.Paths{PinDir: test.BPFFS(t) + "/weir", StateDir: file})
	if _, err := d.Load(); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("load: %v, want an error that names %s", err, file)
	}
	if err := d.Add(Attachment{Key: workload.AttachmentID{ContainerID: "a", IfName: "eth0"}, NetNS: test.NewNetNS(t).Path}); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("add: %v, want an error that names %s", err, file)
	}
}
