// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/json"
	"fmt"

	"github.com/weirmesh/weir/redirect/bpfmap"

	gomaps "maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/test"
)

// verifierLimit is the number of instructions after which the kernel gives up on a program, and
// budget is the part of it that a program may use: the kernels that come count differently.
const (
	verifierLimit  = 1_000_000
	verifierBudget = verifierLimit / 10
)

// measurement is what one program, or all maps together, cost on this kernel.
type measurement struct {
	Program      string  `json:"program"`
	Instructions uint32  `json:"instructions,omitempty"` // that the verifier looked at
	LoadMillis   float64 `json:"load_millis,omitempty"`
	Memory       uint64  `json:"memory"` // bytes
}

// TestReport loads every program for itself and holds it to the budget. With WEIR_TEST_REPORT set
// it prints each measurement as a line of JSON, for the table in docs/compatibility.md.
func TestReport(t *testing.T) {
	test.Need(t, test.Root, test.BPF)
	node, err := bpfmap.LoadBpf()
	if err != nil {
		t.Fatal(err)
	}
	lookup, err := bpfmap.LoadLookup()
	if err != nil {
		t.Fatal(err)
	}
	tables, err := ebpf.NewCollection(&ebpf.CollectionSpec{Maps: node.Maps, Types: node.Types})
	if err != nil {
		t.Fatalf("create maps: %v", err)
	}
	t.Cleanup(tables.Close)

	var all []measurement
	for _, spec := range []*ebpf.CollectionSpec{node, lookup} {
		for _, name := range slices.Sorted(gomaps.Keys(spec.Programs)) {
			all = append(all, measureProgram(t, spec, name, tables.Maps))
		}
	}
	all = append(all, measureMaps(t, tables.Maps))
	if os.Getenv("WEIR_TEST_REPORT") == "" {
		return
	}
	for _, m := range all {
		line, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("REPORT %s\n", line)
	}
}

// measureProgram takes the shortest of five loads.
func measureProgram(t *testing.T, spec *ebpf.CollectionSpec, name string, tables map[string]*ebpf.Map) measurement {
	t.Helper()
	m := measurement{Program: strings.TrimPrefix(name, "weir_")}
	for range 5 {
		start := time.Now()
		one, err := ebpf.NewCollectionWithOptions(&ebpf.CollectionSpec{
			Maps: spec.Maps, Programs: map[string]*ebpf.ProgramSpec{name: spec.Programs[name]}, Types: spec.Types,
		}, ebpf.CollectionOptions{MapReplacements: tables})
		took := float64(time.Since(start).Microseconds()) / 1000
		if err != nil {
			t.Fatalf("load program %s: %+v", name, err)
		}
		info, err := one.Programs[name].Info()
		one.Close()
		if err != nil {
			t.Fatalf("read info of program %s: %v", name, err)
		}
		m.Instructions, _ = info.VerifiedInstructions()
		memory, known := info.Memlock()
		if !known || m.Instructions == 0 {
			t.Fatalf("info of program %s: %d instructions, memory known: %t", name, m.Instructions, known)
		}
		m.Memory = memory
		if m.LoadMillis == 0 || took < m.LoadMillis {
			m.LoadMillis = took
		}
	}
	if m.Instructions > verifierBudget {
		t.Errorf("program %s: the verifier looks at %d instructions, the budget is %d", name, m.Instructions, verifierBudget)
	}
	return m
}

// measureMaps adds up what the empty maps take.
func measureMaps(t *testing.T, tables map[string]*ebpf.Map) measurement {
	t.Helper()
	total := measurement{Program: "maps, empty"}
	for name, table := range tables {
		info, err := table.Info()
		if err != nil {
			t.Fatalf("read info of map %s: %v", name, err)
		}
		memory, _ := info.Memlock() // an empty trie takes none
		total.Memory += memory
	}
	if total.Memory == 0 {
		t.Error("the maps take no memory, says the kernel")
	}
	return total
}
