// SPDX-License-Identifier: MPL-2.0

package program

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// FamilyName is the program of ../../bpf/family.c. It is asked for each socket of
// the node that is not of IP, so it is attached only once a workload has an egress
// guard, and stays then.
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
	root, err := p.OpenCgroupRoot()
	if err != nil {
		return err
	}
	defer root.Close()
	_, err = AttachAll(map[string]*ebpf.Program{FamilyName: collection.Programs[FamilyName]}, spec.Programs, root, filepath.Dir(p.Family()))
	return err
}
