// SPDX-License-Identifier: MPL-2.0

package redirect

import "github.com/weirmesh/weir/redirect/bpfmap"

// Loader loads, upgrades and unloads what all workloads of a node share: programs at the
// root of cgroup v2, tables, and their pins.
type Loader struct {
	Reconciler

	Sizes bpfmap.Sizes // of tables that are made anew
}
