// SPDX-License-Identifier: MPL-2.0

package bpfmap

import (
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
)

// The programs and this package count in the same order, under the same names.
func TestVerdictsAreThoseOfThePrograms(t *testing.T) {
	spec, err := LoadBpf()
	if err != nil {
		t.Fatal(err)
	}
	var enum *btf.Enum
	if err := spec.Types.TypeByName("verdict", &enum); err != nil {
		t.Fatal(err)
	}
	if got, want := len(enum.Values), len(AllVerdicts())+2; got != want {
		t.Errorf("enum verdict has %d values, want %d, VERDICT_MAX and VERDICT_FIRST_REFUSED", got, want-2)
	}
	for _, value := range enum.Values {
		name, ok := strings.CutPrefix(value.Name, "VERDICT_")
		if !ok {
			t.Errorf("enum verdict has a value %s", value.Name)
			continue
		}
		if name == "MAX" {
			if value.Value != uint64(verdictMax) {
				t.Errorf("%s = %d, want %d", value.Name, value.Value, verdictMax)
			}
			continue
		}
		if name == "FIRST_REFUSED" {
			if value.Value != uint64(verdictFirstRefused) {
				t.Errorf("%s = %d, want %d", value.Name, value.Value, verdictFirstRefused)
			}
			continue
		}
		if got, want := Verdict(value.Value).String(), strings.ToLower(name); got != want {
			t.Errorf("verdict %d is called %q, in the programs %q", value.Value, got, want)
		}
	}
}

func TestVerdictTexts(t *testing.T) {
	names, meanings := make(map[string]Verdict), make(map[string]Verdict)
	for _, v := range AllVerdicts() {
		if v.String() == "" || v.Describe() == "" {
			t.Errorf("verdict %d has the name %q and the meaning %q", uint32(v), v, v.Describe())
		}
		if other, taken := names[v.String()]; taken {
			t.Errorf("verdicts %d and %d are both called %q", other, v, v)
		}
		if other, taken := meanings[v.Describe()]; taken {
			t.Errorf("verdicts %s and %s both mean %q", other, v, v.Describe())
		}
		names[v.String()], meanings[v.Describe()] = v, v
		// A listener that is not registered is no connection.
		refused := strings.HasPrefix(v.String(), "refused_") && !strings.HasPrefix(v.String(), "refused_listener_")
		if v.Refused() != refused {
			t.Errorf("%s: Refused() = %t, its name says %t", v, v.Refused(), refused)
		}
	}
	for _, unknown := range []Verdict{verdictMax, 1 << 31} {
		if unknown.String() == "" || unknown.Describe() == "" || !unknown.Refused() {
			t.Errorf("verdict %d of another version: %q, %q, refused: %t",
				uint32(unknown), unknown, unknown.Describe(), unknown.Refused())
		}
	}
}
