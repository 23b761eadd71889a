// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// namespaceLookups are the lookup programs of Weir that a namespace has, whoever
// pinned them. Each of them has a say: two with different tables refuse what the
// other one lets in.
type namespaceLookups struct {
	own   ebpf.ProgramID   // reads the given tables; 0: none
	stale []*programSet    // of this instance, with tables that it gave up
	other *attachedProgram // of another instance
}

// lookupsIn lists them. What hangs in the namespace beside them is its owner's.
func lookupsIn(m *tables, ns *namespace) (found namespaceLookups, err error) {
	list, err := attachedTo(ns.file, ebpf.AttachSkLookup)
	if err != nil || len(list) == 0 {
		return found, err
	}
	table, err := m.table("workloads")
	if err != nil {
		return found, err
	}
	workloads, err := mapID(table)
	if err != nil {
		return found, err
	}
	var node bpfControl
	if _, err := m.get("control", uint32(0), &node); err != nil {
		return found, err
	}
	for _, prog := range list {
		if prog.name != lookupName {
			continue
		}
		if slices.Contains(prog.maps, workloads) {
			found.own = prog.id
			continue
		}
		set, err := setOf(prog)
		if err != nil {
			return found, err
		}
		if set.instance == node.Instance {
			found.stale = append(found.stale, set)
		} else {
			found.other = &prog
		}
	}
	return found, nil
}

func (l namespaceLookups) refusal(ns *namespace) error {
	return fmt.Errorf("namespace %s has lookup program %d of it: %w: end the allocation with the paths that it was started with, or unload that instance",
		ns.file.Name(), l.other.id, ErrOtherInstance)
}

// refuseOtherInstance returns ErrOtherInstance where another instance serves the
// namespace: two of them would refuse every connection of it. A program whose
// pins were just removed takes a moment to end, so that is waited for.
func refuseOtherInstance(m *tables, ns *namespace) error {
	for deadline := time.Now().Add(time.Second); ; time.Sleep(5 * time.Millisecond) {
		there, err := lookupsIn(m, ns)
		if err != nil || there.other == nil {
			return err
		}
		if time.Now().After(deadline) {
			return there.refusal(ns)
		}
	}
}

// pinLookup pins the link of a lookup program that runs without a pin. It reports
// false where the link is on its way out.
func pinLookup(id ebpf.ProgramID, pin string, m *tables, ns *namespace, renew bool) (done bool, err error) {
	err = eachLink(func(l link.Link, info *link.Info) error {
		if done || info.Program != id || lookupInode(l) != ns.inode {
			return nil
		}
		if err := os.Remove(pin); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove stale lookup link: %w", err)
		}
		if done, err = pinAgain(pin, l); err != nil || !renew {
			return err
		}
		prog, err := newLookup(m, ns.cookie)
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
