// SPDX-License-Identifier: MPL-2.0

package bpfmap

import "errors"

// ErrNotLoaded: the node has no programs and maps yet.
var ErrNotLoaded = errors.New("data path is not loaded")

// ErrIncompatible: the node's maps have another layout than this binary.
var ErrIncompatible = errors.New("data path of another version is loaded")
