// SPDX-License-Identifier: MPL-2.0

package workload

import (
	"errors"
	"fmt"
)

// ErrFull: a table of the node has no room for another row.
var ErrFull = errors.New("table is full")

// MaxRows is how many addresses, CIDRs and UIDs a workload may have each.
// Excluded ports need no limit: all of them take 64 rows.
const MaxRows = 4096

// validateRows holds a workload to its part of the node's tables.
func (w Workload) validateRows() error {
	addresses := len(w.Addresses)
	for _, upstream := range w.Upstreams {
		addresses += len(upstream.Addresses)
	}
	for _, proxy := range w.Proxies {
		addresses += len(proxy.VirtualIPs)
	}
	for what, count := range map[string]int{
		"excluded CIDRs": len(w.ExcludeOutboundCIDRs), "excluded UIDs": len(w.ExcludeUIDs), "addresses and virtual IPs": addresses,
	} {
		if count > MaxRows {
			return fmt.Errorf("%s: %w: these are %d, a workload has at most %d", what, ErrFull, count, MaxRows)
		}
	}
	return nil
}
