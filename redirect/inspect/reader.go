// SPDX-License-Identifier: MPL-2.0

// Package inspect reads what is in force on a node and what its records say: status,
// problems, verdicts, other programs on the hooks, and the explanation of a connection.
// It changes nothing.
package inspect

import "github.com/weirmesh/weir/redirect/store"

// Reader reads what the kernel and the records say of the data path of one node. It
// changes nothing, takes no lock, and asks nobody else.
type Reader struct {
	paths store.Paths
}

// At returns the reader of the data path at paths, defaults filled in.
func At(paths store.Paths) Reader {
	return Reader{paths: paths.Or(store.Paths{PinDir: store.DefaultPinDir, StateDir: store.DefaultStateDir})}
}

// Paths returns where this data path keeps its state, defaults filled in.
func (d *Reader) Paths() store.Paths { return d.paths }

// In returns the same reader of pins in another directory.
func (d *Reader) In(pinDir string) Reader {
	other := *d
	other.paths.PinDir = pinDir
	return other
}
