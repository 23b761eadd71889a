// SPDX-License-Identifier: MPL-2.0

package program

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// PinAgain pins something where nothing is, and reports whether it did.
func PinAgain(path string, object interface{ Pin(string) error }) (bool, error) {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return false, fmt.Errorf("create pin directory: %w", err)
	}
	if err := object.Pin(path); err != nil {
		return false, fmt.Errorf("pin %s again: %w", path, err)
	}
	return true, nil
}

// DetachPrograms detaches what sets have at the root and in namespaces, whoever
// pinned it.
func DetachPrograms(sets []*Set) (repairs []Repair, err error) {
	if len(sets) == 0 {
		return nil, nil
	}
	err = EachLink(func(l link.Link, info *link.Info) error {
		if info.Cgroup() == nil && info.NetNs() == nil {
			return nil
		}
		prog, err := DescribeProgram(info.Program)
		if err != nil || prog.Name != LookupName && !slices.Contains(ProgramNames(), prog.Name) {
			return nil // it ended, or is somebody else's
		}
		for _, s := range sets {
			if !slices.ContainsFunc(prog.Maps, s.Reads) {
				continue
			}
			if err := l.Detach(); err != nil {
				return fmt.Errorf("detach program %d (%s): %w", prog.ID, prog.Name, err)
			}
			repairs = append(repairs, Repair{StrayDetached, fmt.Sprintf("program %d (%s)", prog.ID, prog.Name)})
			break
		}
		return nil
	})
	return repairs, err
}

// UnpinAll removes a directory of pins and returns the pins it removed.
func UnpinAll(dir string) (removed []Removal, err error) {
	var problems []error
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		removed = append(removed, Removal{PinRemoved, path})
		problems = append(problems, DetachPin(path))
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return removed, errors.Join(append(problems, err, RemoveTree(dir))...)
}

// DetachPin ends a pinned link now, not when the kernel gets round to it, so
// that no program outlives its maps. A pin of something else is left alone.
func DetachPin(path string) error {
	pinned, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return nil
	}
	defer pinned.Close()
	if err := pinned.Detach(); err != nil && !errors.Is(err, ebpf.ErrNotSupported) && !errors.Is(err, unix.ENOLINK) {
		return fmt.Errorf("detach %s: %w", path, err)
	}
	return nil
}

func RemoveTree(path string) error {
	if err := os.RemoveAll(path); err != nil {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return nil
}
