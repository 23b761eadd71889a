// SPDX-License-Identifier: MPL-2.0

// Package redirect steers the traffic of network namespaces into their own
// proxies with eBPF. It is a library over state that the kernel keeps: maps
// and links pinned in a bpffs, and one record per workload in a directory.
// There is no daemon; whoever calls a method takes a lock, opens what it needs
// and leaves. A plugin that handles one ADD and an agent that runs for months
// use the same methods on the same state.
//
// # How a connection travels
//
// A task in a workload's namespace dials an address, the origin. The program
// on cgroup connect gives the pair (namespace, origin address) a number, the
// index, and rewrites the destination address to 127.128.0.0 plus that index;
// the port stays. The kernel routes that range to lo. The sk_lookup program of
// the namespace hands every connection to the range to the proxy's outbound
// listener. When the proxy asks the accepted socket for SO_ORIGINAL_DST, the
// getsockopt program turns the socket's local address back into the origin.
// So the origin travels in the address itself: nothing is stored per
// connection and nothing has to be cleaned up.
//
// From outside, sk_lookup hands every connection to the proxy's inbound
// listener, with the local address as it was dialled.
//
// # Words
//
// A workload is one network namespace under Weir, named in the kernel by its
// netns cookie, which the kernel never uses twice in a boot. A proxy is its
// Envoy. An exclusion is a port, a CIDR or a UID that is not redirected. A
// verdict is what a program decided about one socket; each has a name and is
// counted. The file bpf/maps.h lists every map, its writer and its reader.
//
// # Changing a workload
//
// Rows carry a generation. A change writes a whole new set of rows under a new
// generation, then flips one row, then removes the old set: a connection sees
// the old configuration or the new one, never both.
package redirect
