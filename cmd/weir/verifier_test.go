// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"fmt"
	"testing"
)

// verifierError says more under %+v, as the library's does.
type verifierError struct{}

func (verifierError) Error() string { return "invalid argument: R1 type=scalar (2 lines omitted)" }

func (e verifierError) Format(f fmt.State, _ rune) {
	text := e.Error()
	if f.Flag('+') {
		text = "invalid argument:\n\t0: (b7) r0 = 0\n\tR1 type=scalar"
	}
	fmt.Fprint(f, text)
}

func TestVerifierError(t *testing.T) {
	n := &node{err: fmt.Errorf("load program: %w", errors.Join(verifierError{}, errors.New("close map")))}
	want(t, try(t, n, nil, "load"), outcome{code: 1, stderr: `weir load: load program: invalid argument: R1 type=scalar (2 lines omitted)
close map
The kernel's full answer: the same command with -verbose
`})
	want(t, try(t, n, nil, "load", "-verbose"), outcome{code: 1, stderr: `weir load: load program: invalid argument: R1 type=scalar (2 lines omitted)
close map
invalid argument:
	0: (b7) r0 = 0
	R1 type=scalar
`})
}
