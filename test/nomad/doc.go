// SPDX-License-Identifier: MPL-2.0

// Package nomad runs a whole node of a cluster on this machine: Nomad's server
// and client, Consul, Docker, the reference CNI plugins, Envoy, Weir's plugin and
// Weir's agent, all of them the real ones, under their usual paths and ports.
//
// A node is a set of namespaces (network, mounts, processes) with the machine's
// own files below a layer of its own. So several nodes live on one machine,
// nothing of a node is left when it is gone, and [Node.Reboot] can take from it
// what a reboot takes. What it shares with the machine is the kernel: the cgroups
// above all.
//
// The test works from outside. [Node.Path] is where it sees the node's files,
// [Node.Command] runs a program inside, [Alloc.Exec] one among an allocation's
// tasks.
package nomad
