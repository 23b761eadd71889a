// SPDX-License-Identifier: MPL-2.0

package redirect

import "github.com/weirmesh/weir/redirect/workload"

// Moved reports whether a workload's namespace has other addresses or routes
// than its record, without the lock and without a change: Check repairs it.
func (d *Datapath) Moved(key workload.AttachmentID) (bool, error) {
	r, err := d.paths.ReadRecord(key)
	if err != nil {
		return false, err
	}
	ns, err := openNamespaceOf(r)
	if err != nil {
		return false, err
	}
	defer ns.Close()
	if _, err := observeSources(r, ns); err != nil {
		return false, err
	}
	if !r.Complete || r.Dirty {
		return true, nil
	}
	there, err := ns.HasRoutes(r.Desired(), r.IPv6)
	return !there, err
}
