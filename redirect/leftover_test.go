// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/test"
)

// rowCounts walks every table of the node and counts its rows, by table; empty
// ones are left out. The tables that have no keys of workloads are not walked.
func rowCounts(t *testing.T, d *Datapath) map[string]int {
	t.Helper()
	keyless := []string{"binders", "dials", "control", "events", "index_totals"}
	entries, err := os.ReadDir(d.Paths().Maps())
	if err != nil {
		t.Fatal(err)
	}
	counts := make(map[string]int)
	for _, entry := range entries {
		if slices.Contains(keyless, entry.Name()) {
			continue
		}
		table, err := ebpf.LoadPinnedMap(filepath.Join(d.Paths().Maps(), entry.Name()), nil)
		if err != nil {
			t.Fatalf("open map %s: %v", entry.Name(), err)
		}
		key, err := table.NextKeyBytes(nil)
		for ; err == nil && key != nil; key, err = table.NextKeyBytes(key) {
			counts[entry.Name()]++
		}
		if err != nil {
			t.Errorf("walk map %s: %v", entry.Name(), err)
		}
		table.Close()
	}
	return counts
}

// files lists what is pinned and recorded, without the directories.
func files(t *testing.T, d *Datapath) (list []string) {
	t.Helper()
	for _, dir := range []string{d.Paths().PinDir, d.Paths().Staging(), d.Paths().Workloads()} {
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil && !entry.IsDir() {
				list = append(list, path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return list
}

// objects are what the kernel holds of one instance: its maps, the programs
// that use them, and the links of those programs.
type objects struct {
	maps, programs, links []uint32
}

// kernelObjects asks the kernel, not the pins. Maps are the instance's own
// where they are pinned now; others on the machine have other IDs.
func kernelObjects(t *testing.T, d *Datapath) objects {
	t.Helper()
	var o objects
	entries, err := os.ReadDir(d.Paths().Maps())
	if err != nil {
		t.Fatal(err)
	}
	calls, err := os.ReadDir(d.Paths().Calls())
	if err != nil {
		t.Fatal(err)
	}
	for i, entry := range append(entries, calls...) {
		dir := d.Paths().Maps()
		if i >= len(entries) {
			dir = d.Paths().Calls()
		}
		table, err := ebpf.LoadPinnedMap(filepath.Join(dir, entry.Name()), nil)
		if err != nil {
			t.Fatal(err)
		}
		info, err := table.Info()
		table.Close()
		if err != nil {
			t.Fatal(err)
		}
		id, _ := info.ID()
		o.maps = append(o.maps, uint32(id))
	}
	o.users(t)
	return o
}

// users finds the programs of the maps, and their links.
func (o *objects) users(t *testing.T) {
	t.Helper()
	o.programs, o.links = nil, nil
	for id, err := ebpf.ProgramGetNextID(0); err == nil; id, err = ebpf.ProgramGetNextID(id) {
		prog, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // it ended
		}
		info, err := prog.Info()
		prog.Close()
		if err != nil {
			continue
		}
		ids, _ := info.MapIDs()
		if slices.ContainsFunc(ids, func(id ebpf.MapID) bool { return slices.Contains(o.maps, uint32(id)) }) {
			o.programs = append(o.programs, uint32(id))
		}
	}
	all := new(link.Iterator)
	defer all.Close()
	for all.Next() {
		if info, err := all.Link.Info(); err == nil && slices.Contains(o.programs, uint32(info.Program)) {
			o.links = append(o.links, uint32(all.ID))
		}
	}
	if err := all.Err(); err != nil {
		t.Fatalf("list links: %v", err)
	}
}

// gone waits until the kernel has none of the objects: it frees them a moment
// after the last reference.
func (o objects) gone(t *testing.T) {
	t.Helper()
	test.Eventually(t, func() error {
		now := objects{maps: o.maps}
		now.users(t)
		if len(now.programs) > 0 || len(now.links) > 0 {
			return fmt.Errorf("programs %v and links %v are still there", now.programs, now.links)
		}
		for _, id := range o.maps {
			if table, err := ebpf.NewMapFromID(ebpf.MapID(id)); err == nil {
				table.Close()
				return fmt.Errorf("map %d is still there", id)
			}
		}
		return nil
	}, "the kernel to free the instance")
}

// counts is what is compared before and after.
func (o objects) counts() [3]int { return [3]int{len(o.maps), len(o.programs), len(o.links)} }

// settle waits until the kernel holds as many objects as want says.
func (o objects) settle(t *testing.T, want [3]int) {
	t.Helper()
	test.Eventually(t, func() error {
		o.users(t)
		if o.counts() != want {
			return fmt.Errorf("maps, programs, links: %d, want %d", o.counts(), want)
		}
		return nil
	}, "objects that nobody uses to go")
}

// nothingLeft fails the test where a loaded node holds anything of a workload.
func nothingLeft(t *testing.T, d *Datapath) {
	t.Helper()
	if diff := cmp.Diff(map[string]int{}, rowCounts(t, d)); diff != "" {
		t.Errorf("rows that are left (-want +got):\n%s", diff)
	}
	for _, dir := range []string{d.Paths().Lookups(), d.Paths().Workloads()} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		for _, entry := range entries {
			t.Errorf("left: %s", filepath.Join(dir, entry.Name()))
		}
	}
}

// routesOf are the routes to the encoded ranges in a namespace.
func routesOf(t *testing.T, ns *test.NetNS) (v4, v6 bool) {
	t.Helper()
	opened, err := host.OpenNamespace(ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	err = opened.Do(func() error {
		found, err := host.PresentRoutes()
		for _, route := range found {
			v4, v6 = v4 || !host.IsIPv6(&route), v6 || host.IsIPv6(&route)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return v4, v6
}

// witness is a link of the test's own on a namespace. It holds no reference to
// it and tells when the kernel has destroyed it.
func witness(t *testing.T, ns *test.NetNS) (died func() error) {
	t.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "witness", Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		t.Fatalf("load witness: %v", err)
	}
	defer prog.Close()
	file, err := os.Open(ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	attached, err := link.AttachNetNs(int(file.Fd()), prog)
	if err != nil {
		t.Fatalf("attach witness: %v", err)
	}
	t.Cleanup(func() { attached.Close() })
	return func() error {
		if inode := program.LookupInode(attached); inode != 0 {
			return fmt.Errorf("namespace with inode %d lives", inode)
		}
		return nil
	}
}

// closedAgain waits until so many descriptors are open: connections to nftables are closed
// behind who used them. Fewer than least would be somebody else's that were closed.
func closedAgain(t *testing.T, least, most int) {
	t.Helper()
	test.Eventually(t, func() error {
		if now := test.OpenFiles(t); now < least || now > most {
			return fmt.Errorf("%d descriptors are open, want %d to %d", now, least, most)
		}
		return nil
	}, "descriptors to be closed")
}

// works fails the test unless a connection of each family reaches the
// allocation's proxy with its origin, and one from outside the inbound one.
func (a *alloc) works() {
	t := a.node.t
	t.Helper()
	for _, origin := range []netip.AddrPort{
		netip.AddrPortFrom(remote4(a.number), 4321),
		netip.AddrPortFrom(remote6(a.number), 4321),
	} {
		answer, err := a.ask("tcp", origin.String())
		if err != nil || answer.Server != a.outbound.Name || answer.Origin != origin {
			t.Errorf("dial %s: %+v, %v; want the proxy and its origin", origin, answer, err)
		}
	}
	answer, err := test.Ask(a.node.remote, "tcp4", addrPort(a.v4, 4321))
	if err != nil || answer.Server != a.inbound.Name {
		t.Errorf("dial from outside: %+v, %v; want the inbound listener", answer, err)
	}
}
