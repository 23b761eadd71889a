// SPDX-License-Identifier: MPL-2.0

package program

import "fmt"

// Repair is one thing that was brought to what it should be: by a load, a CHECK or a look
// at the node.
type Repair struct {
	Kind   RepairKind
	Object string // which one; empty where a kind has one only
}

// RepairKind says what was done.
type RepairKind uint8

// The kinds of repairs: those of the node, and from RoutesSet on those of a workload.
const (
	MapsCreated RepairKind = iota
	MapsMigrated
	Attached
	Reattached
	Updated
	Detached
	StrayDetached
	PinPutBack
	WorkloadRestored
	WorkloadMigrated
	RoutesSet
	RowsWritten
	LookupAttached
	FilterSet
	FamilyHookSet
	ListenerRegistered
	AddressesChanged
	SourcesChanged
	repairKinds
)

// OfNode reports whether it concerns what all workloads of a node share.
func (k RepairKind) OfNode() bool { return k < RoutesSet }

// text is the sentence of a kind, in which the object stands for %s.
func (k RepairKind) text() string {
	return [repairKinds]string{
		MapsCreated:        "created %s",
		MapsMigrated:       "migrated to %s",
		Attached:           "attached %s",
		Reattached:         "re-attached %s",
		Updated:            "updated %s",
		Detached:           "detached %s",
		StrayDetached:      "detached %s, which no pin led to",
		PinPutBack:         "pin of %s put back",
		WorkloadRestored:   "restored %s",
		WorkloadMigrated:   "migrated %s",
		RoutesSet:          "routes to the proxy set",
		RowsWritten:        "rows written",
		LookupAttached:     "lookup program attached",
		FilterSet:          "filter of forwarded packets set",
		FamilyHookSet:      "program for other families of sockets attached",
		ListenerRegistered: "listener %s registered",
		AddressesChanged:   "its addresses are %s",
		SourcesChanged:     "own addresses of its connections are %s",
	}[k]
}

// String is what people read of it.
func (r Repair) String() string {
	if r.Object == "" {
		return r.Kind.text()
	}
	return fmt.Sprintf(r.Kind.text(), r.Object)
}

// MarshalText gives logs and JSON the same sentence.
func (r Repair) MarshalText() ([]byte, error) { return []byte(r.String()), nil }
