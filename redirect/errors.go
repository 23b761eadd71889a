// SPDX-License-Identifier: MPL-2.0

package redirect

import "errors"

// Errors that callers tell apart with errors.Is.
var (
	// ErrNotLoaded: the node has no programs and maps yet.
	ErrNotLoaded = errors.New("data path is not loaded")
	// ErrIncompatible: the node's maps have another layout than this binary.
	ErrIncompatible = errors.New("data path of another version is loaded")
	// ErrUnsupported: the kernel, or how the host mounts cgroups, lacks a feature.
	ErrUnsupported = errors.New("not supported by this host")
	// ErrUnknown: there is no such workload on this node.
	ErrUnknown = errors.New("unknown workload")
	// ErrHostNetNS: the namespace is the host's or the caller's own.
	ErrHostNetNS = errors.New("namespace of the host")
	// ErrNetNSGone: the namespace does not exist, or is not the one on record.
	ErrNetNSGone = errors.New("namespace is gone")
	// ErrFull: a table of the node has no room for another row.
	ErrFull = errors.New("table is full")
	// ErrUnreadable: there is a record, but this version cannot read it.
	ErrUnreadable = errors.New("record cannot be read")
	// ErrOtherInstance: another instance of Weir, whose pins are elsewhere, serves it.
	ErrOtherInstance = errors.New("another instance of Weir is attached")
	// ErrConsulRules: Consul's own rules redirect the namespace already.
	ErrConsulRules = errors.New("namespace is redirected by Consul's own iptables or nftables rules")
)
