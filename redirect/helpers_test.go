// SPDX-License-Identifier: MPL-2.0

package redirect

// helpers are the roles that the test binary plays when a test starts it again
// as a process of its own; see test.Helper.
func helpers() map[string]func(args []string) error {
	return map[string]func(args []string) error{
		eventsFunc:     serveEvents,
		cgroupRootFunc: tellCgroupRoot,
		socketsFunc:    serveSockets,
		scriptFunc:     serveScripts,
		loadProxyFunc:  serveLoadProxy,
		loadTaskFunc:   serveLoadTask,
		operateFunc:    serveOperations,
		foreignFunc:    serveForeign,
		attackFunc:     serveAttacks,
		gatesFunc:      serveGates,
		dialsFunc:      serveDials,
	}
}
