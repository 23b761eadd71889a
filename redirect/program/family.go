// SPDX-License-Identifier: MPL-2.0

package program

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf/link"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// FamilyName is the program of ../../bpf/family.c. The kernel asks it for each socket
// of the node, so it is attached only once a workload has an egress guard, and stays
// then. No cgroup leads to it, so it is not among the programs of the root.
const FamilyName = "weir_family"

// HoldFamilies attaches the program where the workload needs it and it is not
// attached, and reports whether it did. Not every kernel can have it, which is no
// reason to keep the workload from its network: see FamiliesHeld.
func HoldFamilies(p store.Paths, w workload.Workload) (changed bool) {
	return !FamiliesHeld(p, w) && attachFamily(p) == nil
}

// FamiliesHeld reports whether the workload has the program, or needs none.
func FamiliesHeld(p store.Paths, w workload.Workload) bool {
	if w.Egress != workload.GuardAudit && w.Egress != workload.GuardEnforce {
		return true
	}
	_, err := os.Lstat(p.Family())
	return err == nil
}

// RenewFamilies brings this binary's program to a node that has one.
func RenewFamilies(p store.Paths) error {
	_, err := os.Lstat(p.Family())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = attachFamily(p)
	}
	if err != nil {
		return fmt.Errorf("renew %s: %w", FamilyName, err)
	}
	return nil
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
