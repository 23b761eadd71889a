// SPDX-License-Identifier: MPL-2.0

// Package soak runs a node for as long as it is told while everything around it fails,
// and takes it from the last release to this tree and back. Plugin, agent, libcni and
// Consul are real; a proxy is an echo server that tells the origin of each connection.
package soak

import (
	"testing"

	"github.com/weirmesh/weir/test"
)

func TestMain(m *testing.M) {
	test.Main(m, map[string]func([]string) error{
		transferFunc: func([]string) error { return test.Serve(newTransfer()) },
	})
}
