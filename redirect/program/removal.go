// SPDX-License-Identifier: MPL-2.0

package program

import "fmt"

// Removal is one thing that an unload took off the node.
type Removal struct {
	Kind   RemovalKind
	Object string
}

// RemovalKind says what was removed.
type RemovalKind uint8

// The kinds of removals.
const (
	WorkloadRemoved  RemovalKind = iota // a record, and the rows of its workload
	UnreadableRecord                    // a record of which only what is wrong with it is known
	PinRemoved                          // a file in bpffs, and what it held
	ProgramDetached                     // one that no pin led to
	removalKinds
)

// text is what people read of a kind, in which the object stands for %s.
func (k RemovalKind) text() string {
	return [removalKinds]string{
		WorkloadRemoved:  "workload %s",
		UnreadableRecord: "%s",
		PinRemoved:       "pin %s",
		ProgramDetached:  "%s",
	}[k]
}

// String is what people read of it.
func (r Removal) String() string { return fmt.Sprintf(r.Kind.text(), r.Object) }

// MarshalText gives logs and JSON the same words.
func (r Removal) MarshalText() ([]byte, error) { return []byte(r.String()), nil }
