// SPDX-License-Identifier: MPL-2.0

// Package loader puts in place what all workloads of a node share: it loads, upgrades,
// migrates, pins again and unloads programs and tables.
package loader

import (
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/reconcile"
)

// Loader loads, upgrades and unloads what all workloads of a node share: programs at the
// root of cgroup v2, tables, and their pins.
type Loader struct {
	reconcile.Reconciler

	Sizes bpfmap.Sizes // of tables that are made anew
}
