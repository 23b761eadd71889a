// SPDX-License-Identifier: MPL-2.0

package bpfmap

import (
	"github.com/cilium/ebpf"
)

// Sizes are what the tables of a node have room for. They take memory for that much
// from the beginning, 16 bytes a row, and for the rows themselves with use. They hold
// for tables that are made anew: those of a loaded node keep theirs.
type Sizes struct {
	Workloads uint32 // allocations; 0: the default
	Origins   uint32 // destination addresses of all of them; 0: the default
}

// The bounds of Sizes, and what is meant where nothing is said.
const (
	MinWorkloads, DefaultWorkloads, MaxWorkloads = 64, 16384, 65536 // the default is MAX_WORKLOADS
	MinOrigins, DefaultOrigins, MaxOrigins       = 4096, 131072, 1 << 23
)

// Apply sets the sizes of tables that are to be made. All that has rows for each
// workload grows and shrinks with their number.
func (s Sizes) Apply(spec *ebpf.CollectionSpec) {
	for name, table := range spec.Maps {
		switch {
		case name == "origins" || name == "indexes":
			if s.Origins != 0 {
				table.MaxEntries = s.Origins
			}
		case s.Workloads != 0 && (table.Type == ebpf.Hash || table.Type == ebpf.SockHash || table.Type == ebpf.LPMTrie):
			table.MaxEntries = uint32(uint64(table.MaxEntries) * uint64(s.Workloads) / DefaultWorkloads)
		}
	}
}

// KeepSize gives the successor of a table as much room as it had, at least: its rows have
// to find a place. The two tables of origins stay as large as each other.
func KeepSize(spec *ebpf.MapSpec, table *ebpf.Map) {
	switch {
	case spec.Name == "origins" || spec.Name == "indexes":
		spec.MaxEntries = table.MaxEntries()
	case counted(table):
		spec.MaxEntries = max(spec.MaxEntries, table.MaxEntries())
	}
}

// highWaterMarker is the immediate in bpf/origin.h that stands for the high water
// of the table of origins.
const highWaterMarker = 0x5745495248494748

// HighWater is how many rows of a table of so many are taken before a workload that has
// its share gets no more.
func HighWater(rows uint32) uint32 { return rows / 8 * 7 }

// SetHighWater tells the programs how large the table of origins is. Programs of a
// version before have no marker.
func SetHighWater(spec *ebpf.CollectionSpec, rows uint32) {
	for _, program := range spec.Programs {
		for i, insn := range program.Instructions {
			if insn.OpCode.IsDWordLoad() && uint64(insn.Constant) == highWaterMarker {
				program.Instructions[i].Constant = int64(HighWater(rows))
			}
		}
	}
}
