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

//go:generate go tool bpf2go -go-package redirect -target bpfel -cc clang -strip llvm-strip -output-stem bpf -type event -type verdict -type config_flag -type proxy_flag -type exclusion_kind -type address_kind -type listener_role bpf ../bpf/redirect.c -- -O2 -g -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu
//go:generate go tool bpf2go -go-package redirect -target bpfel -cc clang -strip llvm-strip -output-stem lookup -no-global-types lookup ../bpf/lookup.c -- -O2 -g -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu
//go:generate go tool bpf2go -go-package redirect -target bpfel -cc clang -strip llvm-strip -output-stem filter -no-global-types filter ../bpf/filter.c -- -O2 -g -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu

// lookupObject is the object of the namespaces' program, as it was compiled.
func lookupObject() []byte { return _LookupBytes }

// swapObjects replaces the objects of the programs and the namespaces' program by
// others until restore is called, so that a test can load a former version's.
func swapObjects(programs, lookup []byte) (restore func()) {
	oldPrograms, oldLookup := _BpfBytes, _LookupBytes
	_BpfBytes, _LookupBytes = programs, lookup
	return func() { _BpfBytes, _LookupBytes = oldPrograms, oldLookup }
}
