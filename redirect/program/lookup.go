// SPDX-License-Identifier: MPL-2.0

package program

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/cilium/ebpf/link"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/store"
)

// AttachLookup gives the namespace its sk_lookup program, unless the one that
// is pinned is in force there. With renew, a program that is in force is
// replaced through its link, without a moment without one.
func AttachLookup(m *bpfmap.Tables, paths store.Paths, ns *host.Namespace, renew bool) (changed bool, err error) {
	pin := paths.Lookup(ns.Cookie)
	pinned, err := link.LoadPinnedLink(pin, nil)
	switch {
	case err == nil:
		defer pinned.Close()
		if LookupInode(pinned) == ns.Inode {
			if !renew {
				return false, nil
			}
			err := renewLookup(m, paths, pinned, ns.Cookie)
			return err == nil, err
		}
		if err := os.Remove(pin); err != nil {
			return false, fmt.Errorf("remove stale lookup link: %w", err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return false, fmt.Errorf("open lookup link: %w", err)
	}
	there, err := LookupsIn(m, ns)
	if err != nil {
		return false, err
	}
	if there.Other != nil {
		return false, there.refusal(ns)
	}
	if there.Own != 0 {
		if again, err := pinLookup(there.Own, paths, m, ns, renew); again || err != nil {
			return again, err
		}
	}
	if err := attachNewLookup(m, paths, ns); err != nil {
		return false, err
	}
	_, err = DetachPrograms(there.stale)
	return true, err
}

// renewLookup replaces the program of a link.
func renewLookup(m *bpfmap.Tables, paths store.Paths, pinned link.Link, cookie uint64) error {
	prog, err := newLookup(m, paths, cookie)
	if err != nil {
		return err
	}
	defer prog.Close()
	if err := pinned.Update(prog); err != nil {
		return fmt.Errorf("update lookup link: %w", err)
	}
	return nil
}

// attachNewLookup attaches a program by a link of its own, and pins that.
func attachNewLookup(m *bpfmap.Tables, paths store.Paths, ns *host.Namespace) error {
	prog, err := newLookup(m, paths, ns.Cookie)
	if err != nil {
		return err
	}
	defer prog.Close()
	attached, err := link.AttachNetNs(int(ns.File.Fd()), prog)
	if err != nil {
		return fmt.Errorf("attach lookup program: %w", err)
	}
	defer attached.Close()
	if err := os.MkdirAll(paths.Lookups(), 0o700); err != nil {
		return fmt.Errorf("create pin directory: %w", err)
	}
	if err := attached.Pin(paths.Lookup(ns.Cookie)); err != nil {
		return fmt.Errorf("pin lookup link: %w", err)
	}
	return nil
}

// LookupInode is the inode of the namespace that the link is attached to; 0
// once the namespace is gone or somebody detached the link.
func LookupInode(l link.Link) uint64 {
	info, err := l.Info()
	if err != nil || info.NetNs() == nil {
		return 0
	}
	return uint64(info.NetNs().NetnsInode)
}

// DetachLookup ends the program at once. Removing the pin alone would leave it
// to the kernel's own time.
func DetachLookup(paths store.Paths, cookie uint64) error {
	pin := paths.Lookup(cookie)
	if err := DetachPin(pin); err != nil {
		return err
	}
	if err := os.Remove(pin); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove lookup link: %w", err)
	}
	return nil
}
