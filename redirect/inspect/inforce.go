// SPDX-License-Identifier: MPL-2.0

package inspect

import (
	"errors"
	"os"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"golang.org/x/sys/unix"
)

// InForce reports whether a namespace is redirected now, by whichever version. It
// asks the kernel alone, takes no lock, and needs neither pins nor records: it is
// for who could not look at these, which says nothing of the namespace.
func (d *Reader) InForce(netns string) (bool, error) {
	ns, err := host.OpenNamespace(netns)
	if err != nil {
		return false, err
	}
	defer ns.Close()
	root, err := d.paths.OpenCgroupRoot()
	if err != nil {
		return false, err
	}
	defer root.Close()
	lookups, err := program.AttachedTo(ns.File, ebpf.AttachSkLookup)
	if err != nil {
		return false, err
	}
	lookups = slices.DeleteFunc(lookups, func(p program.AttachedProgram) bool { return p.Name != program.LookupName })
	if len(lookups) != 1 {
		return false, nil // none, or two that refuse what the other one lets in
	}
	sets, err := program.SetsAt(root)
	if err != nil {
		return false, err
	}
	for _, s := range sets {
		if !slices.ContainsFunc(lookups[0].Maps, s.Reads) {
			continue
		}
		if !s.Whole() || s.Serves([]uint64{ns.Cookie}) != 1 {
			return false, nil
		}
		return ns.HasEncodedRoute()
	}
	return false, nil
}

// UnreadableRecords counts, by reason, the records that an error of Known or of
// another method which reads all of them is about.
func UnreadableRecords(err error) map[string]int {
	counts := make(map[string]int)
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, one := range joined.Unwrap() {
			if reason, ok := CouldNotLook(one); ok {
				counts[reason]++
			}
		}
	}
	return counts
}

// CouldNotLook reports whether an error says that the node's state could not be
// looked at or written, and nothing of what is in force. reason names it for
// metrics.
func CouldNotLook(err error) (reason string, ok bool) {
	switch {
	case err == nil:
		return "", false
	case errors.Is(err, store.ErrNewer):
		return "record_newer", true
	case errors.Is(err, store.ErrUnreadable):
		return "record_unreadable", true
	case errors.Is(err, bpfmap.ErrIncompatible):
		return "layout", true
	case errors.Is(err, unix.EROFS):
		return "read_only", true
	case errors.Is(err, unix.EAGAIN):
		return "locked", true
	case errors.Is(err, os.ErrPermission):
		return "permission", true
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EIO):
		return "disk", true
	}
	return "", false
}
