// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// cookieMarker is the immediate in ../bpf/lookup.c that stands for the cookie.
const cookieMarker = 0x574549524e53434b

// newLookup loads the sk_lookup program of one namespace. The cookie becomes
// an immediate of the instructions, so there is no map for it, and no BTF is
// loaded: both would cost every workload memory and its ADD time.
func newLookup(m *tables, cookie uint64) (*ebpf.Program, error) {
	if m.preloaded != nil {
		if prog := m.preloaded(cookie); prog != nil {
			return prog, nil
		}
	}
	code, license, err := lookupCode(m, cookie)
	if err != nil {
		return nil, fmt.Errorf("read lookup program: %w", err)
	}
	loaded, err := loadCode(code, license)
	if err != nil {
		return nil, fmt.Errorf("load lookup program: %w", err)
	}
	return loaded, nil
}

// attachLookup gives the namespace its sk_lookup program, unless the one that
// is pinned is in force there. With renew, a program that is in force is
// replaced through its link, without a moment without one.
func attachLookup(m *tables, paths Paths, ns *namespace, renew bool) (changed bool, err error) {
	pin := paths.lookup(ns.cookie)
	pinned, err := link.LoadPinnedLink(pin, nil)
	switch {
	case err == nil:
		defer pinned.Close()
		if lookupInode(pinned) == ns.inode {
			if !renew {
				return false, nil
			}
			prog, err := newLookup(m, ns.cookie)
			if err != nil {
				return false, err
			}
			defer prog.Close()
			if err := pinned.Update(prog); err != nil {
				return false, fmt.Errorf("update lookup link: %w", err)
			}
			return true, nil
		}
		if err := os.Remove(pin); err != nil {
			return false, fmt.Errorf("remove stale lookup link: %w", err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return false, fmt.Errorf("open lookup link: %w", err)
	}
	there, err := lookupsIn(m, ns)
	if err != nil {
		return false, err
	}
	if there.other != nil {
		return false, there.refusal(ns)
	}
	if there.own != 0 {
		if again, err := pinLookup(there.own, pin, m, ns, renew); again || err != nil {
			return again, err
		}
	}
	prog, err := newLookup(m, ns.cookie)
	if err != nil {
		return false, err
	}
	defer prog.Close()
	attached, err := link.AttachNetNs(int(ns.file.Fd()), prog)
	if err != nil {
		return false, fmt.Errorf("attach lookup program: %w", err)
	}
	defer attached.Close()
	if err := os.MkdirAll(paths.lookups(), 0o700); err != nil {
		return false, fmt.Errorf("create pin directory: %w", err)
	}
	if err := attached.Pin(pin); err != nil {
		return false, fmt.Errorf("pin lookup link: %w", err)
	}
	_, err = detachPrograms(there.stale)
	return true, err
}

// lookupInode is the inode of the namespace that the link is attached to; 0
// once the namespace is gone or somebody detached the link.
func lookupInode(l link.Link) uint64 {
	info, err := l.Info()
	if err != nil || info.NetNs() == nil {
		return 0
	}
	return uint64(info.NetNs().NetnsInode)
}

// detachLookup ends the program at once. Removing the pin alone would leave it
// to the kernel's own time.
func detachLookup(paths Paths, cookie uint64) error {
	pin := paths.lookup(cookie)
	if err := detachPin(pin); err != nil {
		return err
	}
	if err := os.Remove(pin); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove lookup link: %w", err)
	}
	return nil
}
