// SPDX-License-Identifier: MPL-2.0

package main

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// goFirst has the plugin's threads, and what they start, run before other processes of
// their cgroup. A Nomad client sets networks up one at a time: where a hundred
// allocations start at once, each plugin call waits for the processors among the
// hundreds of processes that Nomad starts for those before it, and all others wait for
// that call. It takes some milliseconds of one processor. Without CAP_SYS_NICE the call
// is made as it is.
func goFirst() {
	const highest = -20
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return
	}
	for _, thread := range threads {
		if id, err := strconv.Atoi(thread.Name()); err == nil {
			_ = unix.Setpriority(unix.PRIO_PROCESS, id, highest) // only slower
		}
	}
}
