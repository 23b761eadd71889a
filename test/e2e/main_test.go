// SPDX-License-Identifier: MPL-2.0

// Package e2e proves the walks of docs/architecture.md on real parts: one file per walk.
package e2e

import (
	"testing"

	"github.com/weirmesh/weir/test"
)

func TestMain(m *testing.M) {
	test.Main(m, map[string]func([]string) error{
		dialFunc: func([]string) error { return test.Serve(dial) },
		holdFunc: func([]string) error { return test.Serve(newHold()) },
	})
}
