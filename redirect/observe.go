// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// open opens the namespace that the record was made for. ErrNetNSGone says
// that it died, or that its path leads to another one by now.
func openNamespaceOf(r *record) (*namespace, error) {
	ns, err := openNamespace(r.NetNS)
	if err != nil {
		return nil, err
	}
	if ns.cookie != r.Cookie {
		return nil, errors.Join(fmt.Errorf("namespace %s was replaced since ADD: %w", r.NetNS, ErrNetNSGone), ns.Close())
	}
	return ns, nil
}

// observe brings the record's own addresses up to date with the namespace's, and
// says what changed. An address that was taken off the namespace is not the
// workload's any more. A link-local one comes by itself some time after the
// device, so it is registered without a word.
func observeSources(r *record, ns *namespace) (changed []string, err error) {
	var found, broadcast []netip.Addr
	var sources Sources
	err = ns.do(func() error {
		own, err := ownAddresses()
		if err != nil {
			return err
		}
		for _, addr := range own {
			found = append(found, addr.Addr)
			broadcast = append(broadcast, addr.broadcast...)
		}
		sources, err = findSources(own, r.Request.Addresses)
		return err
	})
	if err != nil {
		return nil, err
	}
	if !slices.Equal(routable(found), routable(r.Found)) {
		changed = append(changed, fmt.Sprintf("its addresses are %v now, were %v", found, r.Found))
	}
	if !sources.equal(r.Sources) && len(changed) == 0 {
		changed = append(changed, fmt.Sprintf("own addresses of its connections are %v now, were %v", sources, r.Sources))
	}
	r.dirty = r.dirty || !slices.Equal(found, r.Found) || !sources.equal(r.Sources)
	slices.SortFunc(broadcast, netip.Addr.Compare)
	r.Found, r.Sources, r.Broadcasts = found, sources, slices.Compact(broadcast)
	r.Sliced = r.Sliced || sources.sliced()
	return changed, nil
}
