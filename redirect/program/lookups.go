// SPDX-License-Identifier: MPL-2.0

package program

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/store"
)

// namespaceLookups are the lookup programs of Weir that a namespace has, whoever
// pinned them. Each of them has a say: two with different tables refuse what the
// other one lets in.
type namespaceLookups struct {
	Own   ebpf.ProgramID   // reads the given tables; 0: none
	stale []*Set           // of this instance, with tables that it gave up
	Other *AttachedProgram // of another instance
}

// LookupsIn lists them. What hangs in the namespace beside them is its owner's.
func LookupsIn(m *bpfmap.Tables, ns *host.Namespace) (found namespaceLookups, err error) {
	list, err := AttachedTo(ns.File, ebpf.AttachSkLookup)
	if err != nil || len(list) == 0 {
		return found, err
	}
	workloads, err := m.ID("workloads")
	if err != nil {
		return found, err
	}
	for _, prog := range list {
		if prog.Name != LookupName {
			continue
		}
		if slices.Contains(prog.Maps, workloads) {
			found.Own = prog.ID
			continue
		}
		var node bpfmap.BpfControl
		if _, err := m.Get("control", uint32(0), &node); err != nil {
			return found, err
		}
		set, err := setOf(prog, make(seenTables))
		if err != nil {
			return found, err
		}
		if set.Instance == node.Instance {
			found.stale = append(found.stale, set)
		} else {
			found.Other = &prog
		}
	}
	return found, nil
}

func (l namespaceLookups) refusal(ns *host.Namespace) error {
	return fmt.Errorf("namespace %s has lookup program %d of it: %w: end the allocation with the paths that it was started with, or unload that instance",
		ns.File.Name(), l.Other.ID, ErrOtherInstance)
}

// RefuseOtherInstance returns ErrOtherInstance where another instance serves the
// namespace: two of them would refuse every connection of it. A program whose
// pins were just removed takes a moment to end, so that is waited for.
func RefuseOtherInstance(m *bpfmap.Tables, ns *host.Namespace) error {
	for deadline := time.Now().Add(time.Second); ; time.Sleep(5 * time.Millisecond) {
		there, err := LookupsIn(m, ns)
		if err != nil || there.Other == nil {
			return err
		}
		if time.Now().After(deadline) {
			return there.refusal(ns)
		}
	}
}

// pinLookup pins the link of a lookup program that runs without a pin. It reports
// false where the link is on its way out.
func pinLookup(id ebpf.ProgramID, paths store.Paths, m *bpfmap.Tables, ns *host.Namespace, renew bool) (done bool, err error) {
	pin := paths.Lookup(ns.Cookie)
	err = EachLink(func(l link.Link, info *link.Info) error {
		if done || info.Program != id || LookupInode(l) != ns.Inode {
			return nil
		}
		if err := os.Remove(pin); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove stale lookup link: %w", err)
		}
		if done, err = PinAgain(pin, l); err != nil || !renew {
			return err
		}
		prog, err := newLookup(m, paths, ns.Cookie)
		if err != nil {
			return err
		}
		defer prog.Close()
		if err := l.Update(prog); err != nil {
			return fmt.Errorf("update lookup link: %w", err)
		}
		return nil
	})
	return done, err
}

// ErrOtherInstance: another instance of Weir, whose pins are elsewhere, serves it.
var ErrOtherInstance = errors.New("another instance of Weir is attached")
