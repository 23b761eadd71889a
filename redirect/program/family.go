// SPDX-License-Identifier: MPL-2.0

package program

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/cilium/ebpf/link"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/probe"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// FamilyName is the program of bpf/family.c. The kernel asks it for each socket
// of the node, so it is attached only once a workload has an egress guard, and stays
// then. No cgroup leads to it, so it is not among the programs of the root.
const FamilyName = "weir_family"

// Families brings a node the program, and remembers a kernel that cannot have it: what
// is refused once is refused until the node boots another one.
type Families struct {
	attach func(store.Paths) error
	refuse func() error // nil: the kernel can have it

	mu      sync.Mutex
	refused bool
}

// NewFamilies returns one that asks this kernel.
func NewFamilies() *Families {
	return &Families{attach: attachFamily, refuse: probe.Families}
}

// Hold attaches the program where the workload needs it and it is not attached, and
// reports whether it did. Not every kernel can have it, which is no reason to keep the
// workload from its network: see FamiliesHeld.
func (f *Families) Hold(p store.Paths, w workload.Workload) (changed bool) {
	if FamiliesHeld(p, w) {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refused || FamiliesHeld(p, w) { // another workload brought it meanwhile
		return false
	}
	if found, err := pinRunningFamily(p); found || err != nil {
		return found
	}
	if f.attach(p) == nil {
		return true
	}
	f.refused = f.refuse() != nil // else it failed for a reason that may pass
	return false
}

// FamiliesHeld reports whether the workload has the program, or needs none.
func FamiliesHeld(p store.Paths, w workload.Workload) bool {
	if w.Egress != workload.GuardAudit && w.Egress != workload.GuardEnforce {
		return true
	}
	_, err := os.Lstat(p.Family())
	return err == nil
}

// Renew brings this binary's program to a node that has one.
func (f *Families) Renew(p store.Paths) error {
	_, err := os.Lstat(p.Family())
	if errors.Is(err, fs.ErrNotExist) {
		var found bool
		if found, err = pinRunningFamily(p); err == nil && !found {
			return nil
		}
	}
	if err == nil {
		err = f.attach(p)
	}
	if err != nil {
		return fmt.Errorf("renew %s: %w", FamilyName, err)
	}
	return nil
}

// pinRunningFamily pins the program that reads the node's tables and runs without a pin
// that can be seen, and reports whether there is one: another bpffs, mounted over the
// pin, hides it. A second program beside it would count everything twice.
func pinRunningFamily(p store.Paths) (found bool, err error) {
	workloads, err := PinnedID(filepath.Join(p.Maps(), "workloads"))
	if err != nil || workloads == 0 {
		return false, err
	}
	err = EachLink(func(l link.Link, info *link.Info) error {
		if found || info.Type != link.TracingType {
			return nil
		}
		prog, err := DescribeProgram(info.Program)
		if err != nil || prog.Name != FamilyName || !slices.Contains(prog.Maps, workloads) {
			return nil // it ended, or is somebody else's
		}
		found, err = PinAgain(p.Family(), l)
		return err
	})
	return found, err
}

// attachFamily attaches this binary's program. A link of its kind takes no other
// program, so a new one stands beside the former until that one's pin is gone.
func attachFamily(p store.Paths) error {
	spec, err := bpfmap.LoadFamily()
	if err != nil {
		return fmt.Errorf("read program: %w", err)
	}
	pins, err := bpfmap.PinnedMaps(spec, p.Maps())
	defer bpfmap.CloseMaps(pins)
	if err != nil {
		return err
	}
	collection, err := NewCollection(spec, pins)
	if err != nil {
		return err
	}
	defer collection.Close()
	attached, err := link.AttachTracing(link.TracingOptions{Program: collection.Programs[FamilyName]})
	if err != nil {
		return fmt.Errorf("attach %s: %w", FamilyName, err)
	}
	defer attached.Close()
	if err := os.MkdirAll(filepath.Dir(p.Family()), 0o700); err != nil {
		return fmt.Errorf("create pin directory: %w", err)
	}
	fresh := p.Family() + "_new"
	_ = os.Remove(fresh) // of a process that died here
	if err := attached.Pin(fresh); err != nil {
		return fmt.Errorf("pin link: %w", err)
	}
	if err := os.Rename(fresh, p.Family()); err != nil {
		return errors.Join(fmt.Errorf("publish pin: %w", err), os.Remove(fresh))
	}
	return nil
}
