// SPDX-License-Identifier: MPL-2.0

// Package test holds helpers for tests that need a real kernel: namespaces,
// cgroups, a bpffs, sockets, and processes with a chosen identity. It knows the
// kernel and nothing of the project.
//
// A helper takes a [testing.TB], fails the test when it cannot do its work, and
// takes back what it made by tb.Cleanup. No helper changes the namespace of the
// host.
//
// A package whose tests start processes ([Helper], [NewClient], [EchoProcess])
// calls [Main] from its TestMain:
//
//	func TestMain(m *testing.M) { test.Main(m, nil) }
package test
