// SPDX-License-Identifier: MPL-2.0

// Package layout compares the shapes of a map in two versions, and converts rows from
// one to the other.
package layout

import (
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/weirmesh/weir/redirect/bpfmap"
)

// A map carries the types of its keys and values in the kernel (BTF), so that
// what a node of another version has can be compared and read without a copy of
// that version's headers.

// mapTypes are the types of a map's keys and values; nil where the kernel keeps
// none, as of a map that has no rows to read.
type mapTypes struct{ key, value btf.Type }

// typesOf reads those of a map of the node, which are sought by the names that
// this binary has for them.
func typesOf(table *ebpf.Map, spec *ebpf.MapSpec) (types mapTypes, err error) {
	info, err := table.Info()
	if err != nil {
		return types, err
	}
	id, ok := info.BTFID()
	if !ok || spec.Key == nil || spec.Value == nil {
		return types, nil
	}
	handle, err := btf.NewHandleFromID(id)
	if err != nil {
		return types, err
	}
	defer handle.Close()
	all, err := handle.Spec(nil)
	if err != nil {
		return types, err
	}
	for _, each := range []struct {
		into *btf.Type
		name string
	}{{&types.key, spec.Key.TypeName()}, {&types.value, spec.Value.TypeName()}} {
		if *each.into, err = all.AnyTypeByName(each.name); err != nil && !errors.Is(err, btf.ErrNotFound) {
			return types, err
		}
	}
	return types, nil
}

// SameShape reports whether programs of this binary can share the map.
func SameShape(spec *ebpf.MapSpec, table *ebpf.Map) (bool, error) {
	if spec.Type != table.Type() || spec.Flags != table.Flags() || spec.KeySize != table.KeySize() {
		return false, nil
	}
	if spec.ValueSize != table.ValueSize() && spec.Type != ebpf.RingBuf {
		return false, nil
	}
	types, err := typesOf(table, spec)
	if err != nil || types.key == nil || types.value == nil {
		return err == nil, err
	}
	return layoutOf(types.key) == layoutOf(spec.Key) && layoutOf(types.value) == layoutOf(spec.Value), nil
}

// layoutOf writes down where each field of a type is. Names of enumerators count:
// a number that means something else is another layout.
func layoutOf(t btf.Type) string {
	switch t := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		var text strings.Builder
		for _, member := range t.Members {
			fmt.Fprintf(&text, "%s@%d:%s;", member.Name, member.Offset, layoutOf(member.Type))
		}
		return fmt.Sprintf("{%s%d}", text.String(), t.Size)
	case *btf.Array:
		return fmt.Sprintf("[%d]%s", t.Nelems, layoutOf(t.Type))
	case *btf.Int:
		return fmt.Sprintf("int%d", t.Size)
	case *btf.Enum:
		var text strings.Builder
		for _, value := range t.Values {
			fmt.Fprintf(&text, "%s=%d;", value.Name, value.Value)
		}
		return fmt.Sprintf("int%d(%s)", t.Size, text.String())
	default:
		return t.TypeName()
	}
}

// conversion makes rows of this binary's layout from rows of another one.
type conversion struct {
	from, to mapTypes
	spec     *ebpf.MapSpec
}

func NewConversion(table *ebpf.Map, spec *ebpf.MapSpec) (c conversion, err error) {
	c = conversion{to: mapTypes{spec.Key, spec.Value}, spec: spec}
	if c.from, err = typesOf(table, spec); err != nil {
		return c, err
	}
	if c.from.key == nil || c.from.value == nil {
		return c, fmt.Errorf("%w: the kernel does not know the types of its rows", bpfmap.ErrIncompatible)
	}
	return c, nil
}

func (c conversion) Key(row []byte) []byte {
	key := make([]byte, c.spec.KeySize)
	convert(c.from.key, row, c.to.key, key)
	return key
}

func (c conversion) Value(row []byte) []byte {
	value := make([]byte, c.spec.ValueSize)
	convert(c.from.value, row, c.to.value, value)
	return value
}

// convert copies what both types have, by name; what is new is zero.
func convert(from btf.Type, row []byte, to btf.Type, into []byte) {
	switch to := btf.UnderlyingType(to).(type) {
	case *btf.Struct:
		if former, ok := btf.UnderlyingType(from).(*btf.Struct); ok {
			convertMembers(former, row, to, into)
		}
	case *btf.Array:
		former, ok := btf.UnderlyingType(from).(*btf.Array)
		if !ok {
			return
		}
		size, err := btf.Sizeof(to.Type)
		formerSize, formerErr := btf.Sizeof(former.Type)
		if err != nil || formerErr != nil {
			return
		}
		for i := range int(min(to.Nelems, former.Nelems)) {
			convert(former.Type, row[i*formerSize:], to.Type, into[i*size:])
		}
	default:
		size, err := btf.Sizeof(to)
		formerSize, formerErr := btf.Sizeof(from)
		if err == nil && formerErr == nil {
			copy(into[:size], row[:min(size, formerSize)]) // little-endian, as all that Weir runs on
		}
	}
}

func convertMembers(from *btf.Struct, row []byte, to *btf.Struct, into []byte) {
	for _, member := range to.Members {
		for _, other := range from.Members {
			if other.Name != member.Name || member.BitfieldSize != 0 || other.BitfieldSize != 0 {
				continue
			}
			if from.Name == "verdict_counts" && member.Name == "count" {
				convertCounts(from, row[other.Offset.Bytes():], to, into[member.Offset.Bytes():])
				continue
			}
			convert(other.Type, row[other.Offset.Bytes():], member.Type, into[member.Offset.Bytes():])
		}
	}
}

// convertCounts brings each count to the place that its verdict has now.
func convertCounts(from *btf.Struct, row []byte, to *btf.Struct, into []byte) {
	places := verdictPlaces(to)
	for name, place := range verdictPlaces(from) {
		if now, known := places[name]; known {
			copy(into[8*now:8*now+8], row[8*place:])
		}
	}
}

// verdictPlaces are the places of a version's verdicts, by name.
func verdictPlaces(counts *btf.Struct) map[string]uint64 {
	places := make(map[string]uint64)
	for _, member := range counts.Members {
		array, ok := btf.UnderlyingType(member.Type).(*btf.Array)
		if !ok {
			continue
		}
		names, ok := btf.UnderlyingType(array.Type).(*btf.Enum)
		if !ok {
			continue
		}
		for _, value := range names.Values {
			if value.Name != "VERDICT_MAX" && value.Name != "VERDICT_FIRST_REFUSED" {
				places[value.Name] = value.Value
			}
		}
		return places
	}
	for i, name := range []string{ // of layout 2, whose maps do not tell
		"REDIRECTED", "PROXY", "UID_EXCLUDED", "LOCAL", "UPSTREAM", "PORT_EXCLUDED", "CIDR_EXCLUDED", "DIRECT", "DNS", "UDP",
		"REFUSED_ENCODED", "REFUSED_FAMILY", "REFUSED_DEVICE", "REFUSED_BUDGET", "REFUSED_TABLE", "REFUSED_NO_PROXY",
		"INBOUND", "INBOUND_EXCLUDED", "REFUSED_INBOUND_NO_PROXY", "REFUSED_INBOUND_UNKNOWN",
		"GUARD_AUDIT", "GUARD_EPHEMERAL", "REFUSED_GUARD",
		"LISTENER", "REFUSED_LISTENER_IDENTITY", "REFUSED_LISTENER_ADDRESS", "REFUSED_LISTENER_TABLE",
	} {
		places["VERDICT_"+name] = uint64(i)
	}
	return places
}
