// SPDX-License-Identifier: MPL-2.0

package redirect

// Moved reports whether a workload's namespace has other addresses or routes
// than its record, without the lock and without a change: Check repairs it.
func (d *Datapath) Moved(key AttachmentID) (bool, error) {
	r, err := d.paths.readRecord(key)
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
	if !r.Complete || r.dirty {
		return true, nil
	}
	there, err := ns.hasRoutes(r.desired(), r.IPv6)
	return !there, err
}
