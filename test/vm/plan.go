// SPDX-License-Identifier: MPL-2.0

package main

// kernel is one row of the matrix.
type kernel struct {
	name   string // as in KERNEL=
	suite  string // whose newest cloud kernel it is
	refuse bool   // Weir must refuse it
}

var kernels = []kernel{
	{name: "5.10", suite: "bullseye", refuse: true},
	{name: "6.1", suite: "bookworm"},
	{name: "6.12", suite: "trixie"},
	{name: "newest", suite: "sid"},
}

// suiteOfTests is one test package that runs in the guests, and where.
type suiteOfTests struct {
	dir  string // below the module's root
	run  string // -test.run; empty is all
	tags string
	data string // a directory it reads beside its own testdata
	// refused is where the package runs: on the kernels that Weir refuses, or on the others.
	refused bool
}

// suites are the packages that run in the guests. The files are those that run on the host.
var suites = []suiteOfTests{
	{dir: "test"},
	{dir: "redirect"},
	{dir: "cni", data: "deploy/weir.d"},
	{dir: "cni/network/hostport"},                       // what it asks of conntrack is not the same before Linux 6.12
	{dir: "test/e2e", run: "CNI", data: "cni/testdata"}, // the walk of the plugin; the others want a real Envoy
	{dir: "test/vm/refuse", tags: "refuse", refused: true},
}

// commands are built for the guest and lie in /src/bin, as in bin/ of a checkout.
var commands = []string{"cmd/weir", "cmd/weir-cni"}
