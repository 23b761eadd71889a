// SPDX-License-Identifier: MPL-2.0

// Package bpfmap is the kernel's side of a workload: the generated bindings of
// bpf/, the maps with their rows and generations, and the names of verdicts. It is
// the only room that knows how a row looks.
package bpfmap

//go:generate go tool bpf2go -go-package bpfmap -target bpfel -cc clang -strip llvm-strip -output-stem bpf -type event -type verdict -type config_flag -type proxy_flag -type exclusion_kind -type address_kind -type listener_role Bpf ../../bpf/redirect.c -- -O2 -g -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu
//go:generate go tool bpf2go -go-package bpfmap -target bpfel -cc clang -strip llvm-strip -output-stem lookup -no-global-types Lookup ../../bpf/lookup.c -- -O2 -g -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu
//go:generate go tool bpf2go -go-package bpfmap -target bpfel -cc clang -strip llvm-strip -output-stem filter -no-global-types Filter ../../bpf/filter.c -- -O2 -g -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu
//go:generate go tool bpf2go -go-package bpfmap -target bpfel -cc clang -strip llvm-strip -output-stem family -no-global-types Family ../../bpf/family.c -- -O2 -g -mcpu=v3 -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu

// LookupObject is the object of the namespaces' program, as it was compiled.
func LookupObject() []byte { return _LookupBytes }

// SwapObjects replaces the objects of the programs and the namespaces' program by
// others until restore is called, so that a test can load a former version's.
func SwapObjects(programs, lookup []byte) (restore func()) {
	oldPrograms, oldLookup := _BpfBytes, _LookupBytes
	_BpfBytes, _LookupBytes = programs, lookup
	return func() { _BpfBytes, _LookupBytes = oldPrograms, oldLookup }
}
