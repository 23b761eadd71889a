// SPDX-License-Identifier: MPL-2.0

package inspect

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// OpenNamespaceOf opens the namespace that the record was made for. ErrNetNSGone says
// that it died, or that its path leads to another one by now.
func OpenNamespaceOf(r *store.Record) (*host.Namespace, error) {
	ns, err := host.OpenNamespace(r.NetNS)
	if err != nil {
		return nil, err
	}
	if err := isOf(ns, r); err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	return ns, nil
}

func isOf(ns *host.Namespace, r *store.Record) error {
	if ns.Cookie != r.Cookie {
		return fmt.Errorf("namespace %s was replaced since ADD: %w", r.NetNS, host.ErrNetNSGone)
	}
	return nil
}

// ObserveSources brings the record's own addresses up to date with the namespace's, and
// says what changed. An address that was taken off the namespace is not the
// workload's any more. A link-local one comes by itself some time after the
// device, so it is registered without a word.
func ObserveSources(r *store.Record, ns *host.Namespace) (changed []program.Repair, err error) {
	var found, broadcast []netip.Addr
	var sources workload.Sources
	err = ns.Do(func() error {
		own, err := ns.OwnAddresses()
		if err != nil {
			return err
		}
		for _, addr := range own {
			found = append(found, addr.Addr)
			broadcast = append(broadcast, addr.Broadcast...)
		}
		sources, err = host.FindSources(own, r.Request.Addresses)
		return err
	})
	if err != nil {
		return nil, err
	}
	if !slices.Equal(host.Routable(found), host.Routable(r.Found)) {
		changed = append(changed, program.Repair{Kind: program.AddressesChanged, Object: fmt.Sprintf("%v now, were %v", found, r.Found)})
	}
	if !sources.Equal(r.Sources) && len(changed) == 0 {
		changed = append(changed, program.Repair{Kind: program.SourcesChanged, Object: fmt.Sprintf("%v now, were %v", sources, r.Sources)})
	}
	r.Dirty = r.Dirty || !slices.Equal(found, r.Found) || !sources.Equal(r.Sources)
	slices.SortFunc(broadcast, netip.Addr.Compare)
	r.Found, r.Sources, r.Broadcasts = found, sources, slices.Compact(broadcast)
	r.Sliced = r.Sliced || sources.Sliced()
	return changed, nil
}

// OpenWorkload reads a record and opens its namespace, which the caller closes. It
// takes no lock.
func (d *Reader) OpenWorkload(key workload.AttachmentID) (*store.Record, *host.Namespace, error) {
	r, err := d.paths.ReadRecord(key)
	if err != nil {
		return nil, nil, err
	}
	ns, err := OpenNamespaceOf(r)
	return r, ns, err
}

// Moved reports whether a workload's namespace has other addresses or routes
// than its record, without the lock and without a change: Check repairs it.
func (d *Reader) Moved(key workload.AttachmentID) (bool, error) {
	r, ns, err := d.OpenWorkload(key)
	if err != nil {
		return false, err
	}
	defer ns.Close()
	if _, err := ObserveSources(r, ns); err != nil {
		return false, err
	}
	if r.State != store.Complete || r.Dirty {
		return true, nil
	}
	there, err := ns.HasRoutes(r.Desired(), r.IPv6)
	return !there, err
}
