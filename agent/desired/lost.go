// SPDX-License-Identifier: MPL-2.0

package desired

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/cni/request"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// LostRequest is the request of a workload whose record somebody removed, from what
// libcni remembers of its ADD. It is read as the plugin's CHECK reads it: under the
// operator's policy of today, and for the namespace that the result describes. assigned
// are the addresses that the namespace has; policyDir is as in request.Read.
func LostRequest(a discover.Attachment, assigned []netip.Addr, policyDir string) (*workload.Request, error) {
	asked, err := lostRequest(a, assigned, policyDir)
	if err != nil {
		return nil, fmt.Errorf("restore request of allocation %s: %w", a.Job.AllocID, err)
	}
	return asked, nil
}

func lostRequest(a discover.Attachment, assigned []netip.Addr, policyDir string) (*workload.Request, error) {
	if a.Conf == nil {
		return nil, errors.New("libcni's result has no network configuration that can be read, and with it the operator's policy is missing: 'nomad alloc stop' it")
	}
	asked, err := request.Read(a.Job, a.Args, *a.Conf, policyDir)
	if err != nil {
		return nil, err
	}
	if asked == nil {
		return nil, errors.New("libcni's result has no arguments for Weir")
	}
	if len(a.Addresses) == 0 {
		return nil, errors.New("libcni's result names no address in the namespace")
	}
	for _, addr := range a.Addresses {
		if !slices.Contains(assigned, addr) {
			return nil, fmt.Errorf("address %s is not in %s: the namespace is not the one that ADD was given", addr, a.NetNS)
		}
	}
	asked.Addresses = a.Addresses
	return asked, nil
}

// Restored is what Consul adds to a workload whose record is made anew, so that it is whole
// from its first moment: what is desired now; without a registration what was last on
// record; and where nobody knows that either the guards, which were in force all the same.
func Restored(s Allocation, asked *workload.Request, last inspect.Record, known catalog.Data, node Policy) workload.MeshConfig {
	s.Record = &inspect.Record{Key: s.Key, NetNS: s.NetNS, Request: *asked, MeshConfig: last.MeshConfig}
	switch wanted := For(s, known, node).MeshConfig; {
	case wanted != nil:
		return *wanted
	case last.Key == s.Key:
		return last.MeshConfig
	}
	return *s.withoutProxies(node)
}
